"""The ranks that share a run folder are detected by looking at the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.checkpoint import SharedStorage, detect_shared_storage
from trainer.distributed.environment import ClusterEnvironment


def look(folders: dict[int, Path], must_be_shared: bool) -> SharedStorage | str:
    """Return what this rank, the only one of its node, finds out about its folder."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = ClusterEnvironment(rank, size, 0, 1, node=rank)
    try:
        return detect_shared_storage(folders[rank], place, must_be_shared)
    except ValueError as error:
        return str(error)


SITES = {"one": (0, 0, 0, 0), "two": (0, 0, 1, 1), "mixed": (0, 1, 0, 1), "each its own": (0, 1, 2, 3)}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
def test_ranks_of_a_site_share_a_disk(sites: tuple[int, ...], ranks, tmp_path: Path):
    """The folder may not exist yet, and is empty afterwards."""
    folders = {rank: tmp_path / f"site-{site}" / "runs" / "run" for rank, site in enumerate(sites)}
    found = ranks(4).run(look, folders, False)
    expected = [tuple(rank for rank in range(4) if sites[rank] == site) for site in sites]
    assert found == [SharedStorage(peers, 4) for peers in expected]
    assert [disk.is_shared for disk in found] == [len(set(sites)) == 1] * 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    message = ranks(4).run(look, folders, True)
    if len(set(sites)) == 1:
        assert message == found
    else:
        assert len({text.partition(" is not one folder")[2] for text in message}) == 1
        assert all("require_shared_run_dir=true" in text for text in message)
