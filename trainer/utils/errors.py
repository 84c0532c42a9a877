"""Collect the errors of a user's input, to raise all of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """An error for the user to correct; its message is complete. It ends a run that is not started again."""


class ErrorCollector:
    """Collects errors, so that a user sees all of them at once."""

    def __init__(self):
        self.messages: list[str] = []

    def collect(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make`; None if it raises ValueError, which is collected."""
        try:
            return make()
        except ValueError as error:
            self.messages.append(str(error))
            return None

    def raise_any(self) -> None:
        """Raise a ValueError with all messages, if there are any."""
        raise_errors(self.messages)


def distinct_errors(texts: Iterable[str]) -> list[str]:
    """Return the errors of several ranks, each once. The lines of an error after its first are indented."""
    return list(dict.fromkeys(error for text in texts for error in re.split(r"\n(?! )", text)))


def raise_errors(errors: Sequence[str]) -> None:
    """Raise one ValueError with all errors, if there are any."""
    if errors:
        raise ValueError("\n".join(errors))
