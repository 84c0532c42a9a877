"""Text for messages: values as they are typed, and the nearest valid name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any


def format_value(value: Any) -> str:
    """The value as it is typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def suggest(name: str, valid: Sequence[str]) -> str:
    """What the user may have meant by a dotted name, and what there is, the closest first."""
    shared = os.path.commonprefix([name, *valid])
    start = shared.rfind(".") + 1  # alike are the last parts, not the sections before them
    close = difflib.get_close_matches(name[start:], [other[start:] for other in valid], n=1)
    meant = f"; did you mean {shared[:start]}{close[0]}?" if close else ""
    ordered = sorted(valid, key=lambda other: other[start:] not in close)
    return f"{meant}\n  valid: {', '.join(ordered) or 'none'}"
