"""How the ranks of a silo divide a model. Needs no torch: the launcher checks it before it starts the workers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ShardSpec = int | Literal["full", "node"]  # ranks, all of the silo, or those of the silo on one node


@dataclass(frozen=True)
class ParallelDims:
    """The ranks of a silo as a grid of copies, shards and tensor ranks, by torchtitan's `dp_replicate, dp_shard, tp`.

    The last varies fastest, so the parts of one copy of the model are on consecutive ranks.

    shard   the ranks over which parameters, gradients and the optimizer's state are divided
    tensor  the ranks over which layers are divided
    """

    shard: int = 1
    tensor: int = 1

    @property
    def num_parts(self) -> int:
        """The number of parts that make up a copy of the model."""
        return self.shard * self.tensor


def parallel_dims(sizes: Sequence[int], nodes: Sequence[int], shard: ShardSpec = 1, tensor: int = 1) -> ParallelDims:
    """Return how every silo divides the model: all into the same parts, in any number of copies.

    Args:
        sizes: the number of ranks in each silo
        nodes: the node of each rank, in rank order
        shard: the choice of `silo.shard`
        tensor: the choice of `silo.tensor`

    Raises:
        ValueError: a silo cannot be divided so, or silos would cut the model differently
    """
    divisor, listed = math.gcd(*sizes), _listed(sizes)
    if isinstance(shard, int):
        if divisor % (shard * tensor):
            product = f"silo.shard={shard}" + (f" times silo.tensor={tensor}" if tensor > 1 else "")
            raise ValueError(
                f"{product} does not divide silos of {listed} ranks.\n  valid: divisors of {divisor}; or set silos"
            )
        return ParallelDims(shard, tensor)
    counts = sizes if shard == "full" else _ranks_by_node(sizes, nodes)
    if len(set(counts)) > 1:
        found = (
            f"the silos have {listed} ranks" if shard == "full" else f"the silos have {_listed(counts)} ranks a node"
        )
        raise ValueError(
            f"silo.shard={shard}: {found}, and would cut the model differently.\n"
            f"  set silo.shard={max(math.gcd(*counts) // tensor, 1)}"
        )
    if counts[0] % tensor:
        raise ValueError(
            f"silo.tensor={tensor} does not divide the {counts[0]} ranks of silo.shard={shard}.\n"
            f"  valid: divisors of {counts[0]}"
        )
    return ParallelDims(counts[0] // tensor, tensor)


def _ranks_by_node(sizes: Sequence[int], nodes: Sequence[int]) -> list[int]:
    """Return the number of ranks of each silo on each node that it is on."""
    silos = [silo for silo, size in enumerate(sizes) for _ in range(size)]
    return list(Counter(zip(silos, nodes, strict=True)).values())


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, sorted(set(numbers))))
