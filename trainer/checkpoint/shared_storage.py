"""Which ranks see the same run folder: all of them on a shared disk, else those of a node, or of a site."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed import collectives
from trainer.distributed.environment import Place

SECONDS_TO_APPEAR = 1  # for a file that another node has written


@dataclass(frozen=True)
class Disk:
    """The ranks that see what this one writes, in order; the first writes what only one of them has to."""

    ranks: tuple[int, ...]
    world_size: int

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see it."""
        return len(self.ranks) == self.world_size

    @property
    def first(self) -> int:
        return self.ranks[0]


def find_disk(folder: Path, place: Place, must_be_shared: bool = False) -> Disk:
    """The Disk of this run folder, which need not be there yet. A collective.

    The first rank of each node leaves a file beside the folder, and all look whose they find. Raises ValueError, on
    all ranks, if it `must_be_shared` and is not.
    """
    world = range(place.world_size)
    if place.local_world_size == place.world_size:
        return Disk(tuple(world), len(world))
    nodes = [int(text) for text in collectives.gather_texts(str(place.node))]
    name = collectives.broadcast_text(uuid.uuid4().hex)
    marks = {node: folder.parent / f".{folder.name}-{name}-{node}" for node in sorted(set(nodes))}
    if place.local_rank == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        marks[place.node].touch()
    collectives.barrier()
    found = _found(marks)
    collectives.barrier()
    if place.local_rank == 0:
        marks[place.node].unlink()
    views = [json.loads(text) for text in collectives.gather_texts(json.dumps(found))]
    if must_be_shared and any(len(view) < len(marks) for view in views):
        apart = next(rank for rank in world if nodes[0] not in views[rank])
        raise ValueError(
            f"run_dir={folder} is not one folder on all nodes, though require_shared_run_dir=true: rank {apart} has "
            "another than rank 0.\n  put it on a disk that all nodes share, or set require_shared_run_dir=false"
        )
    return Disk(tuple(rank for rank in world if nodes[rank] in found), len(world))


def _found(marks: Mapping[int, Path]) -> list[int]:
    """The nodes whose marks are there, after some time for all of them to appear."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        found = [node for node, mark in marks.items() if mark.exists()]
        if len(found) == len(marks) or time.monotonic() > deadline:
            return found
        time.sleep(SECONDS_TO_APPEAR / 20)
