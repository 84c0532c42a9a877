"""Shared storage: the ranks that see the same run directory, all of them or those of a node."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed import collectives
from trainer.distributed.environment import ClusterEnvironment

VISIBILITY_TIMEOUT_SECONDS = 1  # for a file that another node has written


@dataclass(frozen=True)
class SharedStorage:
    """The ranks that see what this one writes.

    Attributes:
        ranks: in ascending order; the first writes what only one of them has to.
        world_size: the number of all ranks.
    """

    ranks: tuple[int, ...]
    world_size: int

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see it."""
        return len(self.ranks) == self.world_size

    @property
    def first_rank(self) -> int:
        return self.ranks[0]


def detect_shared_storage(folder: Path, environment: ClusterEnvironment, must_be_shared: bool = False) -> SharedStorage:
    """Detect which ranks share a directory. A collective.

    The first rank of each node creates a file beside the directory, and every rank looks whose files it sees.

    Args:
        folder: the directory, which need not exist.
        environment: this rank and its node.
        must_be_shared: whether all ranks have to share it.

    Raises:
        ValueError: on all ranks, if it must be shared and is not.
    """
    world = range(environment.world_size)
    if environment.local_world_size == environment.world_size:
        return SharedStorage(tuple(world), len(world))
    nodes = [int(text) for text in collectives.all_gather_texts(str(environment.node))]
    name = collectives.broadcast_text(uuid.uuid4().hex)
    marks = {node: folder.parent / f".{folder.name}-{name}-{node}" for node in sorted(set(nodes))}
    if environment.local_rank == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        marks[environment.node].touch()
    collectives.barrier()
    found = visible_nodes(marks)
    collectives.barrier()
    if environment.local_rank == 0:
        marks[environment.node].unlink()
    views = [json.loads(text) for text in collectives.all_gather_texts(json.dumps(found))]
    if must_be_shared and any(len(view) < len(marks) for view in views):
        apart = next(rank for rank in world if nodes[0] not in views[rank])
        raise ValueError(
            f"run_dir={folder} is not one folder on all nodes, though require_shared_run_dir=true: rank {apart} has "
            "another than rank 0.\n  put it on a disk that all nodes share, or set require_shared_run_dir=false"
        )
    return SharedStorage(tuple(rank for rank in world if nodes[rank] in found), len(world))


def visible_nodes(marks: Mapping[int, Path]) -> list[int]:
    """Return the nodes whose markers can be seen, after some time for all of them to appear."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_SECONDS
    while True:
        found = [node for node, mark in marks.items() if mark.exists()]
        if len(found) == len(marks) or time.monotonic() > deadline:
            return found
        time.sleep(VISIBILITY_TIMEOUT_SECONDS / 20)
