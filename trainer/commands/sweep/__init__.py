"""Sweeps: many runs from one command, through Hydra's sweepers and launchers, each run with fresh workers."""

from trainer.commands.sweep.main import main

__all__ = ["main"]
