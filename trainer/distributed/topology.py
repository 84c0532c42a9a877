"""The position of this rank: its silo, what it holds of the model there, and the process groups of both levels.

with distributed(silos=2) as topology:
    ...
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainer.distributed.device import check_nccl, choose_device, count_ranks_on_device
from trainer.distributed.environment import ClusterEnvironment, detect_environment
from trainer.distributed.parallel_dims import ParallelDims, ShardSpec, parallel_dims
from trainer.distributed.peers import Peers
from trainer.distributed.process_groups import new_group, open_mesh, open_silo_groups
from trainer.distributed.silos import SiloSpec, count_shards, silo_sizes
from trainer.distributed.store import SignedStore, open_store


@dataclass(frozen=True)
class Topology:
    """The position of this rank. Ranks of a silo are consecutive, and the first of each silo is its leader.

    A silo holds one copy of the model or several. A copy is one rank, or one rank for each of its parts. Between the
    silos each part travels in shards: one each copy if all silos have as many copies, else one, the first copy's.

    rank              the global rank
    world_size        the number of ranks
    silo              the index of this rank's silo
    silo_rank         the rank inside the silo
    silo_sizes        the number of ranks of each silo
    device            of this rank
    silo_group        the ranks of this silo
    inter_silo_group  the ranks with the same shard of the same part in all silos; None on a rank without a shard
    ranks_on_device   the number of ranks on this rank's GPU, itself included
    dims              how the silos divide the model
    copies_group      the ranks of this silo with the same part; None if this is the only one
    parts_group       the ranks of this silo with the other parts of the same copy; None if there is one part
    mesh              the ranks of this silo, with torch's names of axes; None if there is one part
    """

    rank: int
    world_size: int
    silo: int
    silo_rank: int
    silo_sizes: tuple[int, ...]
    device: torch.device
    silo_group: dist.ProcessGroup | None
    inter_silo_group: dist.ProcessGroup | None
    ranks_on_device: int = 1
    dims: ParallelDims = ParallelDims()
    copies_group: dist.ProcessGroup | None = None
    parts_group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    @property
    def num_silos(self) -> int:
        return len(self.silo_sizes)

    @property
    def silo_size(self) -> int:
        """The number of ranks of this silo."""
        return self.silo_sizes[self.silo]

    @property
    def replica(self) -> int:
        """The index of this rank among those of its silo that see different examples."""
        return self.silo_rank // self.dims.tensor

    @property
    def num_replicas(self) -> int:
        """The number of ranks of this silo that see different examples."""
        return self.silo_size // self.dims.tensor

    @property
    def counts_examples(self) -> bool:
        """Whether this rank counts its examples: one of the ranks that see the same ones does."""
        return self.tensor_rank == 0

    @property
    def num_parts(self) -> int:
        """The number of parts of a copy of the model."""
        return self.dims.num_parts

    @property
    def part(self) -> int:
        """The part of the model that this rank holds."""
        return self.silo_rank % self.num_parts

    @property
    def tensor_rank(self) -> int:
        """The index of this rank among those over which layers are divided."""
        return self.part % self.dims.tensor

    @property
    def shard_rank(self) -> int:
        """The index of this rank among those over which each of its parameters is divided."""
        return self.part // self.dims.tensor

    @property
    def copy(self) -> int:
        """The index of the copy of the model to which this rank's part belongs."""
        return self.silo_rank // self.num_parts

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank's part is of the first copy of the model in its silo."""
        return self.copy == 0

    @property
    def num_copies(self) -> int:
        """The number of copies of the model in this silo."""
        return self.silo_size // self.num_parts

    @property
    def is_leader(self) -> bool:
        return self.silo_rank == 0

    @property
    def leader(self) -> int:
        """The global rank of this silo's first rank."""
        return self.rank - self.silo_rank

    @property
    def first_copy(self) -> int:
        """The global rank of the first rank of this silo with the same part."""
        return self.leader + self.part

    @property
    def num_shards(self) -> int:
        """The number of shards of a part between the silos."""
        return count_shards([size // self.num_parts for size in self.silo_sizes])

    def alone(self) -> Topology:
        """Return the topology of this world by itself, as one silo."""
        return replace(self, silo=0, silo_sizes=(self.world_size,), inter_silo_group=None)

    @property
    def of_launch(self) -> Topology:
        """The topology of the ranks of this world: itself, or one silo if the other silos are launches of their own."""
        return self if sum(self.silo_sizes) == self.world_size else self.alone()

    def shard_of(self, length: int) -> slice:
        """Return this copy's shard of a vector, of which the last ones may be shorter; empty without a shard."""
        return self.shard_at(self.copy, length)

    def shard_at(self, copy: int, length: int) -> slice:
        """Return the shard of a copy in this silo."""
        width = -(-length // self.num_shards)
        start = copy * width
        return slice(min(start, length), min(start + width, length))


@contextmanager
def distributed(
    silos: SiloSpec = 1,
    environment: ClusterEnvironment | None = None,
    store: SignedStore | None = None,
    device: str = "auto",
    silo_timeout_seconds: float = 1800,
    inter_silo_timeout_seconds: float = 1800,
    inter_silo_backend: str = "auto",
    clients: int | None = None,
    backend: str = "auto",
    shard: ShardSpec = 1,
    tensor: int = 1,
) -> Iterator[Topology]:
    """Open the process groups of this rank's Topology, and close them with the block. All ranks must call it.

    A default process group that the caller has opened is used, and stays open.

    Args:
        silos: their number, their sizes, or "node" for one each node
        environment: the position of this process; by default that of the environment variables, or a world of one
        store: that of `open_store`, which is opened by default
        device: "auto", "cpu" or "cuda"
        silo_timeout_seconds: of collectives inside a silo
        inter_silo_timeout_seconds: of collectives between the silos and over the world
        inter_silo_backend: of vectors between the silos; "auto" is that of the world
        clients: the number of clients of a resumed run, see `silo_sizes`
        backend: of vectors; "auto" is NCCL on GPUs and gloo on the CPU. gloo takes vectors from GPUs over TCP, and
            several ranks may then share a GPU.
        shard: see `parallel_dims`
        tensor: likewise

    Raises:
        ValueError: the silos do not fit the world or cannot be divided so, or a rank cannot have its device or backend
    """
    environment = environment or detect_environment()
    owned = not dist.is_initialized()
    with _listen_on_loopback() if owned and environment.is_one_machine else nullcontext():
        if owned:
            store = store or open_store(environment)
            target = _choose_devices(device, environment, store, backend)
            _init_process_group(environment, store, target, backend, timedelta(seconds=inter_silo_timeout_seconds))
        else:
            target = choose_device(device, environment, backend)
        groups: list[dist.ProcessGroup | None] = []
        try:
            vector_backend = _inter_silo_backend(inter_silo_backend, backend, target)
            timeout = timedelta(seconds=silo_timeout_seconds)
            yield _build_topology((silos, clients, shard, tensor), environment, target, timeout, vector_backend, groups)
        finally:
            if owned:
                dist.destroy_process_group()
            else:
                for group in filter(None, groups):
                    dist.destroy_process_group(group)


def restart_count() -> int:
    """Return how often the launcher, or torchrun, has restarted the workers of this run."""
    return int(os.environ.get("SILOTRAIN_RESTART") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _choose_devices(device: str, environment: ClusterEnvironment, store: SignedStore, backend: str) -> torch.device:
    """Return this rank's device; raise ValueError on every rank if one of them cannot have its own."""

    def choose() -> torch.device:
        chosen = choose_device(device, environment, backend)
        check_nccl("launch.backend", backend, chosen)
        return chosen

    return Peers(environment, store).on_all_ranks("device", choose)


def _init_process_group(
    environment: ClusterEnvironment, store: SignedStore, device: torch.device, backend: str, timeout: timedelta
) -> None:
    # Round metrics are reduced as float64 vectors on the CPU, so gloo is needed beside NCCL.
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" and backend != "gloo" else "gloo"
    world = store.unsigned("world")
    dist.init_process_group(
        backends, store=world, rank=environment.rank, world_size=environment.world_size, timeout=timeout
    )


@contextmanager
def _listen_on_loopback() -> Iterator[None]:
    """Let gloo and NCCL listen on the loopback alone inside the block; both read the environment for each group."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, _loopback_interface()))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name)
        os.environ.update(before)


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _build_topology(
    choices: tuple[SiloSpec, int | None, ShardSpec, int],
    environment: ClusterEnvironment,
    device: torch.device,
    silo_timeout: timedelta,
    inter_silo_backend: str | None,
    groups: list[dist.ProcessGroup | None],
) -> Topology:
    silos, clients, shard, tensor = choices
    world_size, rank = dist.get_world_size(), dist.get_rank()
    nodes = torch.zeros(world_size, dtype=torch.int64)
    nodes[rank] = environment.node
    dist.all_reduce(nodes)
    sizes = silo_sizes(silos, nodes.tolist(), clients)
    dims = parallel_dims(sizes, nodes.tolist(), shard, tensor)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    ranks = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    inside = open_silo_groups(ranks, dims, silo_timeout)
    groups += inside.values()
    shards = count_shards([size // dims.num_parts for size in sizes]) * dims.num_parts
    between = [new_group([start + place for start in starts], None, inter_silo_backend) for place in range(shards)]
    groups += between
    # A rank without work must not close its connections while others still open theirs.
    dist.all_reduce(nodes)
    silo = max(index for index, start in enumerate(starts) if start <= rank)
    silo_rank, own = rank - starts[silo], ranks[silo]
    copies = own[silo_rank % dims.num_parts :: dims.num_parts]
    first = rank - silo_rank % dims.num_parts
    return Topology(
        rank,
        world_size,
        silo,
        silo_rank,
        sizes,
        device,
        inside[tuple(own)],
        between[silo_rank] if silo_rank < shards else None,
        count_ranks_on_device(device, environment),
        dims,
        inside.get(tuple(copies)),
        inside[tuple(range(first, first + dims.num_parts))] if dims.num_parts > 1 else None,
        open_mesh(own, rank, dims, inside, device) if dims.num_parts > 1 else None,
    )


def _inter_silo_backend(choice: str, backend: str, device: torch.device) -> str | None:
    """Return the backend between silos; None for that of the world, which is NCCL for tensors on GPUs."""
    check_nccl("launch.inter_silo_backend", choice, device)
    if choice == "nccl" and backend == "gloo":
        raise ValueError(
            "launch.inter_silo_backend=nccl with launch.backend=gloo: NCCL needs a GPU for each rank, and then carries "
            "all vectors.\n  set launch.backend=auto, or launch.inter_silo_backend=auto"
        )
    return "gloo" if choice == "gloo" else None
