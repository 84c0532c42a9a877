"""The collectives of the trainer, besides DDP's own: everything else calls these and never torch.distributed.

Every function here is a collective over the ranks it names: all of them must reach it, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from trainer.distributed.topology import Topology

# torch 2.13 warns of the name by which older ones call it.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def all_reduce_scalars(
    scalars: Mapping[str, float], tables: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The sums over the world of every scalar, and of every table: float64 on the CPU, all in one all-reduce."""
    parts = [torch.tensor(list(scalars.values()), dtype=torch.float64), *(table.view(-1) for table in tables.values())]
    packed = torch.cat(parts)
    dist.all_reduce(packed)
    first, *rest = packed.split([part.numel() for part in parts])
    summed = {name: part.view_as(tables[name]) for name, part in zip(tables, rest, strict=True)}
    return dict(zip(scalars, first.tolist(), strict=True)), summed


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the world, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_reduce_between_silos(vector: Tensor, topology: Topology) -> Tensor:
    """The sum over the silos of one small vector each, in place: leaders all-reduce, then tell their replicas.

    Replicas of a silo hold equal vectors, so only the leader's counts. All ranks end with the same bits.
    """
    if topology.is_leader:
        dist.all_reduce(vector, group=topology.inter_silo_group)
    if topology.num_replicas > 1:
        dist.broadcast(vector, src=topology.leader, group=topology.silo_group)
    return vector


@dataclass(frozen=True)
class PendingCollective:
    """What is on its way; what is sent must stay until it has come."""

    output: Tensor
    input: Tensor
    work: Work

    def wait(self) -> Tensor:
        """What was on its way, as soon as it is there."""
        self.work.wait()
        return self.output


def all_reduce_shard_async(part: Tensor, topology: Topology) -> PendingCollective:
    """Begins the sum over the silos of a part of this replica's slice, in place.

    Only ranks that have a slice call it.
    """
    work = dist.all_reduce(part, group=topology.inter_silo_group, async_op=True)
    assert work is not None
    return PendingCollective(part, part, work)


def broadcast_shard_async(part: Tensor, topology: Topology) -> PendingCollective:
    """Begins to bring the first silo's numbers to those with the same slice in the others, in place."""
    work = dist.broadcast(part, src=topology.replica, group=topology.inter_silo_group, async_op=True)
    assert work is not None
    return PendingCollective(part, part, work)


def all_gather_between_silos_async(row: Tensor, topology: Topology) -> PendingCollective:
    """Begins to bring a row of bytes [n] to those with the same slice in the other silos: [S, n], by silo."""
    rows = row.new_empty(topology.num_silos * len(row))
    work = all_gather(rows, row, group=topology.inter_silo_group, async_op=True)
    assert work is not None
    return PendingCollective(rows.view(topology.num_silos, -1), row, work)


def all_to_all_between_silos_async(rows: Tensor, topology: Topology) -> PendingCollective:
    """Begins to bring a row each to those with the same slice in all silos: [S, n], by silo, becomes what they sent."""
    received = torch.empty_like(rows)
    work = dist.all_to_all_single(received, rows, group=topology.inter_silo_group, async_op=True)
    assert work is not None
    return PendingCollective(received, rows, work)


def all_gather_shards(vector: Tensor, topology: Topology) -> Tensor:
    """The vector of which each replica of this silo holds its own slice, whole on all of them, in place."""
    if topology.num_shards > 1:
        own = vector[topology.shard_of(len(vector))]
        all_gather(vector, own, group=topology.silo_group)
    elif topology.num_replicas > 1:
        dist.broadcast(vector, src=topology.leader, group=topology.silo_group)
    return vector


def all_reduce_in_silo(tensor: Tensor, topology: Topology) -> Tensor:
    """The sum over the replicas of this silo, in place."""
    if topology.num_replicas > 1:
        dist.all_reduce(tensor, group=topology.silo_group)
    return tensor


def all_reduce_between_leaders(tensor: Tensor, topology: Topology) -> Tensor:
    """The sum over the silos' leaders, in place. Only they call it."""
    dist.all_reduce(tensor, group=topology.inter_silo_group)
    return tensor


def all_gather_silo_counts(count: int, topology: Topology) -> list[int]:
    """The number that each silo brings, by silo, on all ranks. A collective over the world."""
    counts = torch.zeros(topology.num_silos, dtype=torch.int64)
    if topology.is_leader:
        counts[topology.silo] = count
    dist.all_reduce(counts)
    return counts.tolist()


def all_to_all_between_leaders(parts: Tensor, counts: list[int], topology: Topology) -> Tensor:
    """What all silos have for this one: [S, k, n] with a part for each of S silos becomes [K, n]. Only leaders call it.

    Silo s brings counts[s] rows to each, and K is their sum; rows come in the order of their silos.
    """
    width = parts.shape[2]
    received = parts.new_empty(sum(counts) * width)
    sizes = [count * width for count in counts]
    dist.all_to_all_single(received, parts.view(-1), sizes, group=topology.inter_silo_group)
    return received.view(-1, width)


def all_gather_between_silos(part: Tensor, topology: Topology) -> Tensor:
    """The parts [n] of all silos, one after the other [S n], on all ranks; only the leaders' count."""
    joined = part.new_empty(topology.num_silos * len(part))
    if topology.is_leader:
        all_gather(joined, part.contiguous(), group=topology.inter_silo_group)
    if topology.num_replicas > 1:
        dist.broadcast(joined, src=topology.leader, group=topology.silo_group)
    return joined


def all_reduce_mean_in_silo(vector: Tensor, topology: Topology) -> Tensor:
    """The mean over the replicas of this silo, in place."""
    return all_reduce_in_silo(vector, topology).div_(topology.num_replicas)


def all_reduce_max_in_silo_async(values: Tensor, topology: Topology) -> Work:
    """Begins the elementwise maximum over the replicas of this silo, in place; `wait()` before it is read."""
    work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=topology.silo_group, async_op=True)
    assert work is not None
    return work


def all_reduce_max(values: Tensor) -> Tensor:
    """The elementwise maximum over the world, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_gather_rows(row: Tensor) -> Tensor:
    """One row of every rank: [k] on each rank becomes [world size, k] on all."""
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=row.dtype)
    rows[dist.get_rank()] = row
    dist.all_reduce(rows)
    return rows


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, in place."""
    dist.broadcast(tensor, src=0)
    return tensor


def broadcast_text(text: str) -> str:
    """Rank 0's text."""
    encoded = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    length = broadcast(torch.tensor([len(text.encode())]))
    if dist.get_rank() != 0:
        encoded = torch.empty(max(int(length), 1), dtype=torch.uint8)
    return bytes(broadcast(encoded)[: int(length)].tolist()).decode()


def all_gather_texts(text: str) -> list[str]:
    """The text of every rank, in rank order, on all ranks. For faults at the start, not for hot paths."""
    encoded = text.encode()
    longest = int(all_reduce_max(torch.tensor([len(encoded)])))
    row = torch.zeros(longest + 1, dtype=torch.uint8)
    row[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else row[:0]
    return [bytes(line.tolist()).rstrip(b"\0").decode() for line in all_gather_rows(row)]


def barrier() -> None:
    """Returns when every rank has come here."""
    dist.all_reduce(torch.zeros(1))


def has_timed_out(error: BaseException) -> bool:
    """Whether a collective failed because somebody did not come in time."""
    return has_lost_peers(error) and any(word in str(error) for word in ("Timed out", "timed out", "timeout"))


def has_lost_peers(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: that one knows the reason, this one does not."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
