"""Text for messages: values in the syntax of the command line, and suggestions of names."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any


def format_value(value: Any) -> str:
    """Format a value in the syntax of the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def suggest(name: str, valid: Sequence[str]) -> str:
    """Return a suggestion for an invalid dotted name, and the list of valid ones, the closest first."""
    shared = os.path.commonprefix([name, *valid])
    start = shared.rfind(".") + 1  # compare only the last parts, since a shared prefix makes all names similar
    close = difflib.get_close_matches(name[start:], [other[start:] for other in valid], n=1)
    meant = f"; did you mean {shared[:start]}{close[0]}?" if close else ""
    ordered = sorted(valid, key=lambda other: other[start:] not in close)
    return f"{meant}\n  valid: {', '.join(ordered) or 'none'}"
