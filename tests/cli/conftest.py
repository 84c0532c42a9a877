"""Folders for commands, and runs that several files of tests read."""

from __future__ import annotations

from collections.abc import Callable
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
def new_shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Shell]:
    """Return a shell in an empty folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda: Shell(tmp_path_factory.mktemp("command"), cache)


@pytest.fixture(scope="module")
def shell(new_shell: Callable[[], Shell]) -> Shell:
    """Return a shell for all tests of a file."""
    return new_shell()


@pytest.fixture(scope="session")
def sync_run(new_shell: Callable[[], Shell]) -> Trained:
    """Run two rounds of the default experiment."""
    shell = new_shell()
    return Trained(SYNC, shell.folder / "sync", shell.train(*SYNC))
