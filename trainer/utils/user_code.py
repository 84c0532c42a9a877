"""Where an error was raised in the user's own code."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

# Of this package, of the standard library, and of installed packages.
FOREIGN_FOLDERS = (
    str(Path(__file__).parents[1]) + os.sep,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


class RemoteTraceback(Exception):
    """The cause of an error from another process: its traceback there, and the line of the user's own code."""

    def __init__(self, text: str, location: str):
        super().__init__(text, location)
        self.text, self.location = text, location

    def __str__(self) -> str:
        return f"\n{self.text}"


def user_location(error: BaseException | None) -> str:
    """Return the innermost line of the user's own code that an error, or what caused it, came through.

    It is such as `my_module.py, line 7, in load: return columns["label"]`; empty if there is none.
    """
    while error is not None:
        if isinstance(error.__cause__, RemoteTraceback):
            return error.__cause__.location
        # A file with a wrong syntax did not run, so it has no frame.
        if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
            return f"{_shown(error.filename)}, line {error.lineno}: {(error.text or '').strip()}"
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if _is_users(frame.filename):
                return f"{_shown(frame.filename)}, line {frame.lineno}, in {frame.name}: {frame.line}"
        error = error.__cause__ or error.__context__
    return ""


def _is_users(filename: str) -> bool:
    # Compiled packages name their sources, which are not there.
    return not filename.startswith(("<", *FOREIGN_FOLDERS)) and not filename.endswith((".pyx", ".pxi"))


def _shown(filename: str) -> str:
    """Return the path of a file, relative to the working directory if it lies below."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
