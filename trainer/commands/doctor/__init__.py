"""`python -m trainer doctor`: examines the machines of a run."""

from trainer.commands.doctor.main import main

__all__ = ["main"]
