"""Tables for the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Column, Table
from rich.text import Text

COLUMN_GAP = 3  # characters between two columns


def make_table(columns: Sequence[Column | str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table without a frame, its cells shown literally, without markup."""
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
