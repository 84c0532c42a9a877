"""Folders to start commands in, and the runs that several files look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Ended, Shell

SYNC = ("rounds=2", "run_dir=sync")


@dataclass(frozen=True)
class Trained:
    """A run that was started with these overrides."""

    overrides: tuple[str, ...]
    folder: Path
    ended: Ended


@pytest.fixture(scope="session")
def new_shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Shell]:
    """A shell in an empty folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda: Shell(tmp_path_factory.mktemp("command"), cache)


@pytest.fixture(scope="module")
def shell(new_shell: Callable[[], Shell]) -> Shell:
    """The shell of a file of tests."""
    return new_shell()


@pytest.fixture(scope="session")
def sync_run(new_shell: Callable[[], Shell]) -> Trained:
    """The default experiment, two rounds of it."""
    shell = new_shell()
    return Trained(SYNC, shell.folder / "sync", shell.train(*SYNC))
