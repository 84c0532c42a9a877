"""Where this rank stands: its silo, its replica inside the silo, and the process groups of both levels.

Made once, in one place, and always torn down: `with distributed(silos=2) as topology: ...`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # pyright: ignore

from trainer.distributed.device import check_nccl, choose_device, count_ranks_on_device
from trainer.distributed.environment import ClusterEnvironment, detect_environment, launch_hint

SiloSpec = int | Sequence[int] | str  # how many, their sizes, or "node": one a machine

POLL_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True)
class Topology:
    """Frozen facts about this rank. Ranks of a silo are consecutive; replica 0 of each silo is its leader."""

    rank: int
    world_size: int
    silo: int
    replica: int
    silo_sizes: tuple[int, ...]
    device: torch.device
    silo_group: dist.ProcessGroup | None
    inter_silo_group: dist.ProcessGroup | None  # who has the same slice in the other silos; None on ranks without one
    ranks_on_device: int = 1  # ranks that this one's GPU is shared by, itself among them

    @property
    def num_silos(self) -> int:
        return len(self.silo_sizes)

    @property
    def num_replicas(self) -> int:
        return self.silo_sizes[self.silo]

    @property
    def is_leader(self) -> bool:
        return self.replica == 0

    @property
    def leader(self) -> int:
        """The global rank of this silo's replica 0."""
        return self.rank - self.replica

    @property
    def num_shards(self) -> int:
        """In how many slices a vector goes between the silos: one a replica, or one where silos differ in size."""
        return count_shards(self.silo_sizes)

    def shard_of(self, length: int) -> slice:
        """This replica's slice of a vector whose length the slices divide; empty where the leader has it all."""
        width = length // self.num_shards
        assert width * self.num_shards == length, (length, self.num_shards)
        start = self.replica * width
        return slice(min(start, length), min(start + width, length))


def silo_sizes(silos: SiloSpec, nodes: Sequence[int], clients: int | None = None) -> tuple[int, ...]:
    """The number of ranks in each silo, for ranks that run on these nodes (one entry a rank, in rank order).

    clients: of a run that goes on: how many it was begun with. On another number of ranks it takes as many silos as it
    can have, at most so many and at most `silos`.

    Raises ValueError when the silos do not fit the world.
    """
    world_size = len(nodes)
    if isinstance(silos, str):
        assert silos == "node", silos
        if list(nodes) != sorted(nodes):
            raise ValueError(
                "silos=node: the ranks of a silo follow each other, but the nodes were given theirs in turns.\n"
                "  set srun --distribution=block, or silos= a number"
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
    """In how many slices a vector goes between silos of these sizes."""
    return sizes[0] if len(set(sizes)) == 1 else 1


def _largest_divisor(parts: int, limit: int) -> int:
    """The largest number up to the limit that divides so many parts evenly."""
    return max(number for number in range(1, min(parts, limit) + 1) if parts % number == 0)


def _merge_sizes(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """So many sums over runs of as many sizes each."""
    each = len(sizes) // count
    return tuple(sum(sizes[start : start + each]) for start in range(0, len(sizes), each))


@contextmanager
def distributed(
    silos: SiloSpec = 1,
    environment: ClusterEnvironment | None = None,
    store: Store | None = None,
    device: str = "auto",
    silo_timeout_seconds: float = 1800,
    inter_silo_timeout_seconds: float = 1800,
    inter_silo_backend: str = "auto",
    clients: int | None = None,
    backend: str = "auto",
) -> Iterator[Topology]:
    """This rank's Topology, with its process groups open until the block is left.

    A process group that the caller has opened already is used and left open. Without `environment` and `store` (see `meet`)
    they are what the environment says, see `discover`; the world may be this process. `clients` is for a run that goes
    on, see `silo_sizes`. Vectors travel by `backend`, between silos by `inter_silo_backend`: gloo takes them over TCP
    from GPUs too, and several ranks may then share one.
    """
    environment = environment or detect_environment()
    owned = not dist.is_initialized()
    if owned:
        store = store or open_store(environment)
        target = _choose_devices(device, environment, store, backend)
        _init_process_group(environment, store, target, backend, timedelta(seconds=inter_silo_timeout_seconds))
    else:
        target = choose_device(device, environment, backend)
    groups: list[dist.ProcessGroup | None] = []
    try:
        between = _inter_silo_backend(inter_silo_backend, backend, target)
        topology = _build_topology(
            silos, clients, environment, target, timedelta(seconds=silo_timeout_seconds), between, groups
        )
        yield topology
    finally:
        if owned:
            dist.destroy_process_group()
        else:
            for group in filter(None, groups):
                dist.destroy_process_group(group)


def open_store(environment: ClusterEnvironment) -> Store:
    """The store through which the ranks of this world find each other, at the address that the place names."""
    if environment.host:
        host = f"[{environment.host}]" if ":" in environment.host else environment.host
        store = next(rendezvous(f"tcp://{host}:{environment.port}", environment.rank, environment.world_size))[0]
        return PrefixStore(_start_prefix(store, environment), store)
    assert environment.world_size == 1, "a world of several ranks needs a launcher: MASTER_ADDR is not set"
    return HashStore()


def _start_prefix(store: Store, environment: ClusterEnvironment) -> str:
    """A name for this start of the world, equal on all ranks: torchrun's store keeps the keys of earlier starts.

    Rank 0 makes it up. The others take what they read for it when rank 0 has answered under that name.
    """
    own = uuid.uuid4().hex
    if environment.rank == 0:
        store.set("start", own)
        for rank in range(1, environment.world_size):
            store.set(f"{own}/{rank}/{store.get(f'{own}/{rank}').decode()}", "")
        return own
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/{environment.rank}", own)
        if store.check([f"{start}/{environment.rank}/{own}"]):
            return start
        time.sleep(POLL_INTERVAL_SECONDS)


def restart_count() -> int:
    """How often the workers of this run were started again by their launcher, ours or torchrun."""
    return int(os.environ.get("SILOTRAIN_RESTART") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def broadcast_via_store(store: Store, key: str, environment: ClusterEnvironment, make: Callable[[], str]) -> str:
    """The text that rank 0 makes, on every rank, before there is a process group."""
    if environment.rank == 0:
        store.set(key, make())
    return store.get(key).decode()


def _choose_devices(device: str, environment: ClusterEnvironment, store: Store, backend: str) -> torch.device:
    """This rank's device; ValueError on every rank if one of them cannot have its own."""
    chosen, fault = None, ""
    try:
        chosen = choose_device(device, environment, backend)
        check_nccl("launch.backend", backend, chosen)
    except ValueError as error:
        fault = str(error)
    store.set(f"fault/{environment.rank}", fault)
    told = (store.get(f"fault/{rank}").decode() for rank in range(environment.world_size))
    if errors := broadcast_via_store(
        store, "faults", environment, lambda: "\n".join(dict.fromkeys(filter(None, told)))
    ):
        raise ValueError(errors)
    assert chosen
    return chosen


def _init_process_group(
    environment: ClusterEnvironment, store: Store, device: torch.device, backend: str, timeout: timedelta
) -> None:
    # Headers are float64 vectors on the CPU, so gloo is there beside NCCL.
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" and backend != "gloo" else "gloo"
    world = PrefixStore("world", store)
    dist.init_process_group(
        backends, store=world, rank=environment.rank, world_size=environment.world_size, timeout=timeout
    )


def _build_topology(
    silos: SiloSpec,
    clients: int | None,
    environment: ClusterEnvironment,
    device: torch.device,
    silo_timeout: timedelta,
    inter_silo_backend: str | None,
    groups: list[dist.ProcessGroup | None],
) -> Topology:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    nodes = torch.zeros(world_size, dtype=torch.int64)
    nodes[rank] = environment.node
    dist.all_reduce(nodes)
    sizes = silo_sizes(silos, nodes.tolist(), clients)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    # Every rank makes every group, in one order: new_group is a collective over the world.
    for start, size in zip(starts, sizes, strict=True):
        groups.append(_new_group(range(start, start + size), silo_timeout, None))
    for replica in range(count_shards(sizes)):
        groups.append(_new_group([start + replica for start in starts], None, inter_silo_backend))
    # Who has nothing to do must not close its connections while others still open theirs.
    dist.all_reduce(nodes)
    silo = max(index for index, start in enumerate(starts) if start <= rank)
    replica = rank - starts[silo]
    between = dict(enumerate(groups[len(sizes) :])).get(replica)
    sharers = count_ranks_on_device(device, environment)
    return Topology(rank, world_size, silo, replica, sizes, device, groups[silo], between, sharers)


def _inter_silo_backend(choice: str, backend: str, device: torch.device) -> str | None:
    """The backend between silos; None for the world's own, which is nccl for tensors on GPUs."""
    check_nccl("launch.inter_silo_backend", choice, device)
    if choice == "nccl" and backend == "gloo":
        raise ValueError(
            "launch.inter_silo_backend=nccl with launch.backend=gloo: NCCL wants a GPU for each rank, and then takes "
            "all vectors.\n  set launch.backend=auto, or launch.inter_silo_backend=auto"
        )
    return "gloo" if choice == "gloo" else None


def _new_group(ranks: Sequence[int], timeout: timedelta | None, backend: str | None) -> dist.ProcessGroup | None:
    group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return group if isinstance(group, dist.ProcessGroup) else None
