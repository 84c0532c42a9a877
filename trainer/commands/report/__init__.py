"""`python -m trainer report`: compares runs in a table, a page and CSV files."""

from trainer.commands.report.main import main

__all__ = ["main"]
