"""Runs side by side: a table, a page with curves, and CSV."""

from trainer.reports.command import main

__all__ = ["main"]
