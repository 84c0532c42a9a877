"""`python -m trainer -m`: sweeps of runs, through Hydra's sweepers and launchers."""

from trainer.commands.sweep.main import main

__all__ = ["main"]
