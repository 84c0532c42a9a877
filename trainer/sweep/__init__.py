"""Sweeps: many runs from one command, through Hydra's sweepers and launchers, each run with fresh workers."""

from trainer.sweep.sweep import main

__all__ = ["main"]
