"""`python -m trainer plan`: time, traffic and memory of a run, before it starts."""

from trainer.commands.plan.main import main

__all__ = ["main"]
