"""The collectives of the trainer, besides DDP's own. Other packages call these and never torch.distributed.

Every function is a collective over the ranks that it names. All of them must call it, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from trainer.distributed.topology import Topology
from trainer.utils.errors import distinct_errors, raise_errors

T = TypeVar("T")

# torch 2.13 deprecates the older name.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


# Over the world


def all_reduce_scalars(
    scalars: Mapping[str, float], tables: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sum scalars and tables over the world, in one all-reduce.

    Args:
        scalars: the same names on all ranks; summed in float64
        tables: float64 on the CPU, of the same names and shapes on all ranks

    Returns:
        the sums of the scalars, and of the tables
    """
    parts = [torch.tensor(list(scalars.values()), dtype=torch.float64), *(table.view(-1) for table in tables.values())]
    packed = torch.cat(parts)
    dist.all_reduce(packed)
    first, *rest = packed.split([part.numel() for part in parts])
    summed = {name: part.view_as(tables[name]) for name, part in zip(tables, rest, strict=True)}
    return dict(zip(scalars, first.tolist(), strict=True)), summed


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the world, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_reduce_max(values: Tensor) -> Tensor:
    """Take the elementwise maximum over the world, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_gather_rows(row: Tensor) -> Tensor:
    """Gather a row [k] of every rank into [world size, k], on all ranks."""
    rows = torch.zeros(dist.get_world_size(), len(row), dtype=row.dtype)
    rows[dist.get_rank()] = row
    dist.all_reduce(rows)
    return rows


def all_gather_texts(text: str) -> list[str]:
    """Gather the text of every rank, in rank order, on all ranks. Meant for the start of a run, not for hot paths."""
    encoded = text.encode()
    longest = int(all_reduce_max(torch.tensor([len(encoded)])))
    row = torch.zeros(longest + 1, dtype=torch.uint8)
    row[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if encoded else row[:0]
    return [bytes(line.tolist()).rstrip(b"\0").decode() for line in all_gather_rows(row)]


def on_all_ranks(make: Callable[[], T]) -> T:
    """Return the result of `make` on this rank; raise ValueError on all ranks, with the errors of all, if any fails."""
    made, message = None, ""
    try:
        made = make()
    except ValueError as error:
        message = str(error)
    if errors := [text for text in all_gather_texts(message) if text]:
        raise_errors(distinct_errors(errors))
    return made  # pyright: ignore[reportReturnType] (without an error it was made)


def all_gather_silo_counts(count: int, topology: Topology) -> list[int]:
    """Gather the number of each silo's leader, in the order of silos, on all ranks."""
    counts = torch.zeros(topology.num_silos, dtype=torch.int64)
    if topology.is_leader:
        counts[topology.silo] = count
    dist.all_reduce(counts)
    return counts.tolist()


def broadcast(tensor: Tensor) -> Tensor:
    """Broadcast the tensor of rank 0 to the world, in place. It may have any dtype and any strides."""
    sent = contiguous_bits(tensor)
    dist.broadcast(sent, src=0)
    return _copy_bits(sent, tensor)


def broadcast_text(text: str) -> str:
    """Broadcast the text of rank 0 to the world."""
    encoded = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    length = broadcast(torch.tensor([len(text.encode())]))
    if dist.get_rank() != 0:
        encoded = torch.empty(max(int(length), 1), dtype=torch.uint8)
    return bytes(broadcast(encoded)[: int(length)].tolist()).decode()


def barrier() -> None:
    """Wait until every rank of the world has called this."""
    dist.all_reduce(torch.zeros(1))


# Inside a silo


def all_reduce_in_silo(tensor: Tensor, topology: Topology) -> Tensor:
    """Sum a tensor over the ranks of this silo, in place."""
    if topology.silo_size > 1:
        dist.all_reduce(tensor, group=topology.silo_group)
    return tensor


def all_reduce_mean_in_silo(vector: Tensor, topology: Topology) -> Tensor:
    """Average a vector over the ranks of this silo, in place."""
    return all_reduce_in_silo(vector, topology).div_(topology.silo_size)


def sum_over_parts(tensor: Tensor, topology: Topology) -> Tensor:
    """Sum a tensor over the parts of one copy of the model, in place: the squares of the parts of a vector, say."""
    if topology.num_parts > 1:
        dist.all_reduce(tensor, group=topology.parts_group)
    return tensor


def scatter_parts(memory: Tensor, pieces: list[Tensor], topology: Topology) -> None:
    """Give each rank of the world the piece of its part of the model. A collective over the world.

    The pieces go to the first copy in the first silo, from there to the first copies in the other silos, and to the
    other copies at last. So about one model leaves rank 0.

    Args:
        memory: where the piece goes
        pieces: of each part, on rank 0; none elsewhere
        topology: of this rank
    """
    if topology.copy == 0:
        if topology.silo == 0:
            dist.scatter(memory, pieces or None, src=0, group=topology.parts_group)
        if topology.num_silos > 1:
            dist.broadcast(memory, group=topology.inter_silo_group, group_src=0)
    if topology.num_copies > 1:
        dist.broadcast(memory, src=topology.first_copy, group=topology.copies_group)


def norm_over_parts(norm: Tensor, order: float, topology: Topology) -> Tensor:
    """Return the p-norm of a vector from the p-norm of this rank's part of it: (sum over parts of norm^p)^(1/p).

    Args:
        norm: of this rank's part
        order: p; infinity for the largest magnitude
        topology: of this rank
    """
    if topology.num_parts == 1:
        return norm
    powers = norm.to(topology.device, torch.float64, copy=True)
    if math.isinf(order):
        dist.all_reduce(powers, op=dist.ReduceOp.MAX, group=topology.parts_group)
        return powers.to(norm.dtype)
    return sum_over_parts(powers.pow_(order), topology).pow_(1 / order).to(norm.dtype)


def broadcast_over_tensor_ranks(tensor: Tensor, topology: Topology) -> Tensor:
    """Broadcast a tensor of the first of the ranks over which layers are divided to the others, in place."""
    if topology.dims.tensor > 1 and len(tensor):
        assert topology.mesh is not None
        dist.broadcast(tensor, group=topology.mesh.get_group("tp"), group_src=0)
    return tensor


def broadcast_in_silo(tensors: Sequence[Tensor], topology: Topology) -> None:
    """Broadcast tensors of the silo's first rank to the others, in place, all together."""
    if topology.silo_size == 1 or not tensors:
        return
    bits = [contiguous_bits(tensor) for tensor in tensors]
    packed = torch.cat(bits)
    dist.broadcast(packed, src=topology.leader, group=topology.silo_group)
    for sent, tensor in zip(packed.split([len(part) for part in bits]), tensors, strict=True):
        _copy_bits(sent, tensor)


def contiguous_bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of any dtype as a vector: a view of its memory if that is contiguous, or a copy."""
    # Conjugated and negated views have other bits than their values.
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _copy_bits(sent: Tensor, tensor: Tensor) -> Tensor:
    """Write bytes as those of `contiguous_bits` into a tensor, unless they are its own memory."""
    if sent.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))
    return tensor


def all_reduce_max_in_silo_async(values: Tensor, topology: Topology) -> Work:
    """Start the elementwise maximum over the ranks of this silo, in place; `wait()` before reading it."""
    work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=topology.silo_group, async_op=True)
    assert work is not None
    return work


def all_gather_shards(vector: Tensor, topology: Topology) -> Tensor:
    """Complete a vector, of which each copy in this silo holds its own shard, in place."""
    if topology.num_shards == 1:
        return _broadcast_to_copies(vector, topology)
    shard = vector[topology.shard_of(len(vector))]
    if missing := -len(vector) % topology.num_shards:  # in the last shards
        whole = vector.new_zeros(len(vector) + missing)
        own = whole.view(topology.num_shards, -1)[topology.copy]
        own[: len(shard)] = shard
        all_gather(whole, own, group=topology.copies_group)
        return vector.copy_(whole[: len(vector)])
    all_gather(vector, shard, group=topology.copies_group)
    return vector


# In a group, while this rank computes


@dataclass(frozen=True)
class PendingCollective:
    """A collective under way.

    output  the result, once it has arrived
    input   the tensor that is sent; referenced until then, since the backend reads its memory
    work    of torch.distributed
    """

    output: Tensor
    input: Tensor
    work: Work | None

    def wait(self) -> Tensor:
        """Wait for the result, and return it."""
        assert self.work is not None
        self.work.wait()
        return self.output


# A computation that yields each collective that it has started, gets the output of it, and yields its result at last.
Task = Generator[Any, Tensor, None]


def all_reduce_async(tensor: Tensor, group: dist.ProcessGroup | None) -> PendingCollective:
    """Start the sum of a tensor, in place."""
    return PendingCollective(tensor, tensor, dist.all_reduce(tensor, group=group, async_op=True))


def broadcast_async(tensor: Tensor, group: dist.ProcessGroup | None) -> PendingCollective:
    """Start the broadcast of the tensor of the group's first rank, in place."""
    return PendingCollective(tensor, tensor, dist.broadcast(tensor, group=group, group_src=0, async_op=True))


def all_gather_async(part: Tensor, group: dist.ProcessGroup | None) -> PendingCollective:
    """Start to gather the parts [n, ...] of R ranks into [R, n, ...], in the order of ranks."""
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    return PendingCollective(parts, part, all_gather(parts.flatten(0, 1), part, group=group, async_op=True))


def all_to_all_async(parts: Tensor, group: dist.ProcessGroup | None) -> PendingCollective:
    """Start to exchange the R equal parts of a tensor [R n, ...], one for each rank, for one of each rank."""
    received = torch.empty_like(parts)
    return PendingCollective(received, parts, dist.all_to_all_single(received, parts, group=group, async_op=True))


def finish_tasks(
    started: Iterable[tuple[Task, PendingCollective]],
    collectives: int,
    wait: Callable[[PendingCollective], Tensor] = PendingCollective.wait,
) -> Iterator[Any]:
    """Yield the results of tasks, in their order. While a collective of one travels, another is computed.

    All ranks start the collectives in the same order, which callbacks of gloo would not.

    Args:
        started: tasks, and the first collective of each, which is under way.
        collectives: the number of collectives of each task.
        wait: returns the output of a collective.
    """

    def advance(items: Iterable[tuple[Task, PendingCollective]]) -> Iterator[tuple[Task, Any]]:
        return ((task, task.send(wait(pending))) for task, pending in items)

    for _ in range(collectives - 1):
        started = _one_ahead(advance(started))
    return (result for _, result in advance(started))


def _one_ahead(items: Iterable[tuple[Task, Any]]) -> Iterator[tuple[Task, Any]]:
    """Yield each item once the next has been made, so that its collective travels meanwhile."""
    last: list[tuple[Task, Any]] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


# Between the silos


def all_reduce_between_silos(vector: Tensor, topology: Topology) -> Tensor:
    """Sum a small vector over the silos, in place; all ranks with the same part end with the same bits.

    The copies in a silo hold equal vectors, of which only the first one's counts.
    """
    if topology.is_first_copy:
        dist.all_reduce(vector, group=topology.inter_silo_group)
    return _broadcast_to_copies(vector, topology)


def all_gather_between_silos(part: Tensor, topology: Topology) -> Tensor:
    """Concatenate the parts [n] of the silos' first copies to [S n], in the order of silos, on all ranks."""
    joined = part.new_empty(topology.num_silos * len(part))
    if topology.is_first_copy:
        all_gather(joined, part.contiguous(), group=topology.inter_silo_group)
    return _broadcast_to_copies(joined, topology)


def all_reduce_between_first_copies(tensor: Tensor, topology: Topology) -> Tensor:
    """Sum a tensor over the first copies of the silos, in place. For first copies alone, each part by itself."""
    dist.all_reduce(tensor, group=topology.inter_silo_group)
    return tensor


def all_to_all_between_first_copies(parts: Tensor, counts: list[int], topology: Topology) -> Tensor:
    """Exchange rows between the first copies of the silos. For first copies alone, each part by itself.

    Args:
        parts: rows [S, k, n], of which k go to each of the S silos
        counts: k of each silo
        topology: of this rank

    Returns:
        the rows [sum of counts, n] for this silo, in the order of silos
    """
    width = parts.shape[2]
    received = parts.new_empty(sum(counts) * width)
    sizes = [count * width for count in counts]
    dist.all_to_all_single(received, parts.view(-1), sizes, group=topology.inter_silo_group)
    return received.view(-1, width)


def _broadcast_to_copies(vector: Tensor, topology: Topology) -> Tensor:
    """Broadcast a vector of this silo's first copy to the others, in place, each part by itself."""
    if topology.num_copies > 1:
        dist.broadcast(vector, src=topology.first_copy, group=topology.copies_group)
    return vector


# Errors


def has_timed_out(error: BaseException) -> bool:
    """Whether a collective failed because a rank did not call it in time."""
    return has_lost_peers(error) and any(word in str(error) for word in ("Timed out", "timed out", "timeout"))


def has_lost_peers(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, which knows the reason."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
