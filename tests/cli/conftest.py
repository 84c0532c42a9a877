"""Folders for commands, and runs that several files of tests read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Ended, Shell

SYNC = ("rounds=2", "run_dir=sync")


@dataclass(frozen=True)
class Trained:
    """A run with these overrides."""

    overrides: tuple[str, ...]
    folder: Path
    ended: Ended


@pytest.fixture(scope="session")
def all_shells() -> list[Shell]:
    """Return the shells that have been made."""
    return []


@pytest.fixture(scope="session")
def new_shell(tmp_path_factory: pytest.TempPathFactory, all_shells: list[Shell]) -> Callable[[], Shell]:
    """Return a shell in an empty folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def make() -> Shell:
        all_shells.append(Shell(tmp_path_factory.mktemp("command"), cache))
        return all_shells[-1]

    return make


@pytest.fixture(scope="module")
def shell(new_shell: Callable[[], Shell]) -> Shell:
    """Return a shell for all tests of a file."""
    return new_shell()


@pytest.fixture(autouse=True)
def end_what_is_left(all_shells: list[Shell]) -> Iterator[None]:
    """Kill the commands that a failed test has left running: they would fail the next test too."""
    yield
    for shell in all_shells:
        shell.end_all()


@pytest.fixture(scope="session")
def sync_run(new_shell: Callable[[], Shell]) -> Trained:
    """Run two rounds of the default experiment."""
    shell = new_shell()
    return Trained(SYNC, shell.folder / "sync", shell.train(*SYNC))
