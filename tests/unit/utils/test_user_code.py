"""Where an error was raised in the user's own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.utils.seeding import derive_seed
from trainer.utils.user_code import FOREIGN_FOLDERS, user_location


def error_of(source: str, folder: Path) -> BaseException:
    """Return the error of a user's file."""
    path = folder / "mine.py"
    path.write_text(source)
    try:
        exec(compile(source, str(path), "exec"), {"derive_seed": derive_seed, "json": json})
    except BaseException as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("x = 1\nassert x > 1", "line 2, in <module>: assert x > 1"),
        ("def f():\n    return {}['a']\nf()", "line 2, in f: return {}['a']"),
        ("json.loads('{')", "line 1, in <module>: json.loads('{')"),
        ("derive_seed(*3)", "line 1, in <module>: derive_seed(*3)"),
        ("x = (1,", "line 1: x = (1,"),
        ("raise SystemExit(3)", "line 1, in <module>: raise SystemExit(3)"),
    ],
)
def test_the_innermost_line_of_the_users_file_is_named(
    source: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the lines of the packages that it calls."""
    monkeypatch.setattr("trainer.utils.user_code.FOREIGN_FOLDERS", (*FOREIGN_FOLDERS, __file__))
    error = error_of(source, tmp_path)
    assert user_location(error) == f"{tmp_path}/mine.py, {place}"
    monkeypatch.chdir(tmp_path)
    assert user_location(error) == f"mine.py, {place}"


def test_the_cause_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.utils.user_code.FOREIGN_FOLDERS", (*FOREIGN_FOLDERS, __file__))
    error = ValueError("in other words")
    error.__cause__ = error_of("1 / 0", tmp_path)
    assert user_location(error).endswith("mine.py, line 1, in <module>: 1 / 0")
    assert user_location(ValueError()) == ""
