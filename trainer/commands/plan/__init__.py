"""What a run will cost, before anything starts: time, bytes and memory, and what would make it cost less."""

from trainer.commands.plan.main import main

__all__ = ["main"]
