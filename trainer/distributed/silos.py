"""The sizes of the silos in a world. Needs no torch: the launcher checks them before it starts the workers."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.distributed.environment import launch_hint

SiloSpec = int | Sequence[int] | str  # their number, their sizes, or "node" for one each node


def silo_sizes(silos: SiloSpec, nodes: Sequence[int], clients: int | None = None) -> tuple[int, ...]:
    """Return the number of ranks in each silo.

    Args:
        silos: the silos of the configuration
        nodes: the node of each rank, in rank order
        clients: of a resumed run, its number of clients. It takes the largest number of silos of equal size, at most
            this and, if `silos` is a number, at most that.

    Raises:
        ValueError: the silos do not fit the world
    """
    world_size = len(nodes)
    if isinstance(silos, str):
        assert silos == "node", silos
        if list(nodes) != sorted(nodes):
            raise ValueError(
                "silos=node: the ranks of a silo must be consecutive, but they alternate between the nodes.\n"
                "  set srun --distribution=block, or silos= to a number"
            )
        per_node = [nodes.count(node) for node in sorted(set(nodes))]
        return _merge_sizes(per_node, _largest_divisor(len(per_node), clients or len(per_node)))
    if isinstance(silos, int):
        if clients is not None:
            silos = _largest_divisor(world_size, min(silos, clients))
        if silos < 1 or world_size % silos:
            valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ValueError(
                f"silos={silos} does not divide the world of {world_size} ranks.\n"
                f"  valid: {valid}, a list of sizes that add up to {world_size}, or silos=node; "
                f"or start another number of ranks: {launch_hint(max(silos, 1))}"
            )
        return (world_size // silos,) * silos
    sizes = tuple(silos)
    if not sizes or min(sizes) < 1 or sum(sizes) != world_size:
        listed = ",".join(map(str, sizes))
        raise ValueError(
            f"silos=[{listed}] adds up to {sum(sizes)} ranks, but the world has {world_size}.\n"
            f"  valid: positive sizes that add up to {world_size}; or {launch_hint(sum(sizes))}"
        )
    return sizes


def count_shards(sizes: Sequence[int]) -> int:
    """Return the number of shards of a vector between silos of these sizes."""
    return sizes[0] if len(set(sizes)) == 1 else 1


def _largest_divisor(parts: int, limit: int) -> int:
    """Return the largest divisor of `parts` up to the limit."""
    return max(number for number in range(1, min(parts, limit) + 1) if parts % number == 0)


def _merge_sizes(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return `count` sums of equally many consecutive sizes."""
    each = len(sizes) // count
    return tuple(sum(sizes[start : start + each]) for start in range(0, len(sizes), each))
