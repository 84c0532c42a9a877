"""What a run would find on these machines, and what would go wrong, before it does."""

from trainer.commands.doctor.main import main

__all__ = ["main"]
