"""Output files of a report. A file that is not such a report is not overwritten."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.format import write_text

SEARCH_LENGTH = 1000  # characters


@dataclass(frozen=True)
class OutputFile:
    """A file to write.

    `option` names it on the command line, and `mark` is a text near the beginning of each such report.
    """

    option: str
    path: Path
    mark: str

    def write_error(self) -> str:
        """Return why it cannot be written; empty if it can."""
        if self.path.is_dir():
            return f"{self.option} {self.path} is a folder.\n  name a file"
        if not self.path.parent.is_dir():
            return f"{self.option} {self.path}: no such folder: {self.path.parent}.\n  create it, or name another file"
        if self.path.exists() and self.mark not in self._head():
            return f"{self.option} {self.path} exists and is not such a report.\n  name another file"
        return ""

    def write(self, text: str) -> None:
        """Replace the file atomically; raise ValueError if it cannot be written."""
        try:
            write_text(self.path, text)
        except OSError as error:
            reason = f"{self.option} {self.path} cannot be written: {error.strerror}"
            raise ValueError(f"{reason}\n  name another file with {self.option}") from error

    def _head(self) -> str:
        with self.path.open(encoding="utf-8", errors="replace") as file:
            return file.read(SEARCH_LENGTH)


def check(targets: Iterable[OutputFile]) -> None:
    """Raise ValueError with all the reasons why these files cannot be written."""
    if errors := [error for target in targets if (error := target.write_error())]:
        raise ValueError("\n".join(errors))
