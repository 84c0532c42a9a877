"""Runs side by side: a table, a page with curves, and CSV."""

from trainer.commands.report.main import main

__all__ = ["main"]
