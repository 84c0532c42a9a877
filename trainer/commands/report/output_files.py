"""The files that a report is written to; what is no report of ours is not overwritten."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.format import write_text

MARK_WITHIN = 1000  # characters


@dataclass(frozen=True)
class OutputFile:
    """A file to be written. option: how the user names it. mark: what stands at the beginning of one of ours."""

    option: str
    path: Path
    mark: str

    def write_error(self) -> str:
        """Why it cannot be written; empty if it can."""
        if self.path.is_dir():
            return f"{self.option} {self.path} is a folder.\n  name a file in it"
        if not self.path.parent.is_dir():
            return f"{self.option} {self.path}: there is no folder {self.path.parent}.\n  make it, or name another file"
        if self.path.exists() and self.mark not in self._beginning():
            return f"{self.option} {self.path} is there, and no such report.\n  name another file with {self.option}"
        return ""

    def write(self, text: str) -> None:
        """Writes it aside and renames it; ValueError if that cannot be done."""
        try:
            write_text(self.path, text)
        except OSError as error:
            reason = f"{self.option} {self.path} cannot be written: {error.strerror}"
            raise ValueError(f"{reason}\n  name another file with {self.option}") from error

    def _beginning(self) -> str:
        with self.path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MARK_WITHIN)


def check(targets: Iterable[OutputFile]) -> None:
    """Raises ValueError with everything that speaks against writing these files."""
    if errors := [fault for target in targets if (fault := target.write_error())]:
        raise ValueError("\n".join(errors))
