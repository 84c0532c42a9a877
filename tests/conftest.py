"""Fixtures for all tests."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.pool import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rows of a test as long that its `quick_rows` leaves to `./scripts/test --all`."""
    rows: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("quick_rows"):
            rows[item.nodeid.partition("[")[0]].append(item)
    for test in rows.values():
        mark = test[0].get_closest_marker("quick_rows")
        assert mark
        (count,) = mark.args
        quick = {index * len(test) // count for index in range(count)}
        for index, item in enumerate(test):
            if index not in quick:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Return worlds of live gloo ranks: `ranks(2).run(function, *arguments)`."""
    pools: dict[int, RankPool] = {}

    def of_size(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield of_size
    for pool in pools.values():
        pool.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache data sets, and keep a token, in folders of the session, not in the user's home."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
    monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system in memory, with these options."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"mount is not permitted: {done.stderr.decode().strip()}")
        return place

    try:
        yield mount
    finally:
        if place.is_mount():
            subprocess.run(["umount", str(place)], check=True)
