"""Text for messages: values in the syntax of the command line, and suggestions of names."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")  # at the beginning of a cell
TIME_SCALES = {"us": 1e6, "ms": 1e3, "s": 1.0}


def format_value(value: Any) -> str:
    """Format a value in the syntax of the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def is_number(text: str) -> bool:
    """Return whether a text is a number, as Python reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def harmless_cell(cell: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula: a text that begins like one, with an apostrophe."""
    text = str(cell)
    return f"'{text}" if text.startswith(FORMULA_SIGNS) and not is_number(text) else cell


def suggest(name: str, valid: Sequence[str], meant: str | None = None) -> str:
    """Return a suggestion for an invalid dotted name, and the list of valid ones, the closest first.

    Args:
        name: the invalid one.
        valid: those to list.
        meant: the one to suggest; None: the one that is spelt most alike, if there is one.
    """
    if meant is None:
        shared = os.path.commonprefix([name, *valid])
        start = shared.rfind(".") + 1  # compare only the last parts, since a shared prefix makes all names similar
        close = difflib.get_close_matches(name[start:], [other[start:] for other in valid], n=1)
        meant = shared[:start] + close[0] if close else None
    question = f"; did you mean {meant}?" if meant else ""
    ordered = sorted(valid, key=lambda other: other != meant)
    return f"{question}\n  valid: {', '.join(ordered) or 'none'}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with the SI prefix that fits.

    >>> [format_bytes(count) for count in (0, 999, 172_288, 12_345_678)]
    ['0 B', '999 B', '172.3 kB', '12.35 MB']
    """
    power = min(int(math.log10(count) // 3), len(BYTE_UNITS) - 1) if count >= 1 else 0
    return f"{count / 1000**power:.4g} {BYTE_UNITS[power]}"


def format_seconds(seconds: float) -> str:
    """Format a duration in microseconds, milliseconds or seconds.

    >>> [format_seconds(seconds) for seconds in (0, 2.5e-5, 0.04, 12)]
    ['0 us', '25 us', '40 ms', '12 s']
    """
    unit = "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"
    return f"{seconds * TIME_SCALES[unit]:.4g} {unit}"


def first_few(items: Iterable[object], limit: int) -> list[str]:
    """Return the texts of the first few items, and one that counts the others.

    >>> ", ".join(first_few(range(7), limit=4))
    '0, 1, 2, 3, and 3 more'
    """
    texts = list(map(str, items))
    return texts[:limit] + [f"and {len(texts) - limit:,} more"] * (len(texts) > limit)
