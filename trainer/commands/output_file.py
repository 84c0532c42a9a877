"""Files that commands write: they are named by the user, and nothing is overwritten unasked."""

from __future__ import annotations

from pathlib import Path


def check_output(option: str, path: Path | None, overwrite: bool) -> None:
    """Check that a file can be written.

    Args:
        option: the option that names it.
        path: the file; None: the option was left out.
        overwrite: whether a file there is replaced.

    Raises:
        ValueError: there is such a file or folder, or no folder to put it into.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder.\n  name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: no such folder: {path.parent}.\n  create it, or name another file")
    if path.exists() and not overwrite:
        raise ValueError(f"{option} {path} exists.\n  name another file, or replace it with --overwrite")
