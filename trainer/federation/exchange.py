"""How the silos of a federation come together: each site meets the others at the coordinator."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.algorithms.base import RoundSession, RunSession
from trainer.algorithms.round import Round
from trainer.checkpoint.format import iter_leaves, unflatten
from trainer.distributed import collectives
from trainer.distributed.compression import UpdateCompression
from trainer.distributed.sharding import ParallelModel
from trainer.distributed.topology import Topology
from trainer.distributed.transport import AllReduce, Transport, decode_upload, make_upload, upload_like
from trainer.federation.link import BehindError, LinkLostError
from trainer.federation.messages import TABLE, VECTOR, Limit, Message
from trainer.loop.exchange import LEFT_OUT, RANKS, ROWS, UNFINISHED, Combined, Scalars, Tables
from trainer.loop.stopping import LeftBehind, Preempted
from trainer.utils.errors import InputError

START = "start/model"  # the meeting at which sites get the initial model
TRAINING = "/training"  # ends the keys of the meetings at which rounds are combined
STOPPING = "stopping"  # a scalar that is each launch's own
MAX_STATE_FACTOR = 4  # the state of a run, by that of a site that begins
WEIGHTS = ("weight", "trained_weight")
FIGURES = ("loss_sum", "gradient_norms", f"{TABLE}cohort", f"{TABLE}silos")  # which may be infinite
OUT_OF_TIME = "out_of_time"  # a scalar that is the coordinator's
ROWS_BYTES = 1 << 26  # that tables of rows may have more at a launch of many ranks, or at all sites together

Tree = Mapping[str, Any]


class Meetings(Protocol):
    """The coordinator, as a site sees it. Every method is a collective of the site's ranks."""

    def meet(self, message: Message, limit: Limit) -> Message:
        """Bring a message to the meeting that its `key` names; return the result on all ranks.

        Raises:
            LinkLostError: the coordinator is out of reach, or this site is asked to stop; on all ranks.
            BehindError: the meeting is over, and its result is kept no more; on all ranks.
        """
        ...

    def newest(self, rounds: int, limit: Limit) -> Message | None:
        """Return the state of the run if this site has missed a round after these; None if it has missed none.

        Raises:
            LinkLostError: the coordinator is out of reach, or this site is asked to stop; on all ranks.
        """
        ...


class Gatherings(Protocol):
    """The sites, as the coordinator sees them."""

    def gather(self, key: str, limit: Limit, make_state: Callable[[], Message] | None) -> dict[str, Message] | None:
        """Return what the members have brought, in their order; None if this process is asked to stop.

        Args:
            key: of the meeting.
            limit: of what a member may bring.
            make_state: returns the state of the run, for members that are late; None: no one can be late yet.
        """
        ...

    def publish(self, key: str, result: Message) -> None:
        """Give the members the result of a meeting."""
        ...


class SiteExchange:
    """A site's end: sums go over its own ranks, and then its leader meets the others.

    Args:
        meetings: with the other members, at the coordinator.
        name: of this site.
        topology: of this rank, in the federation.
        compression: of updates, which are sent whole.
        layout: the start and shape of each parameter in a vector.
    """

    averages_personal = False  # they do not leave their site

    def __init__(
        self,
        meetings: Meetings,
        name: str,
        topology: Topology,
        compression: UpdateCompression,
        layout: Sequence[tuple[int, torch.Size]],
    ):
        self.meetings, self.name = meetings, name
        self.transport = make_upload(topology, compression)

    def start(self, parallel: ParallelModel, digests: tuple[int, int]) -> int:
        tensors = _start_tensors(parallel.module)
        result = self._meet(Message({"key": START}), Limit(_num_bytes(tensors)))
        if result.header["digests"] != list(digests):
            raise InputError(
                "the model is not the coordinator's: its parameters have other shapes, or other frozen values.\n"
                "  start all members with the same model= and the same files"
            )
        _unpack(tensors, result.tensors)
        return digests[0]

    def catch_up(self, rounds: int, make_state: Callable[[], Tree]) -> Tree | None:
        # Before its first round a server optimizer may have none of the vectors that it has later.
        own = (leaf for _, leaf in iter_leaves(make_state()) if isinstance(leaf, Tensor))
        try:
            newest = self.meetings.newest(rounds, Limit(MAX_STATE_FACTOR * _num_bytes(own)))
        except LinkLostError as error:
            raise Preempted from error
        if newest is None:
            return None
        return unflatten({**newest.header["values"], **newest.tensors})

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        own, own_tables = collectives.all_reduce_scalars(scalars, tables)
        if own.get(STOPPING):
            return own, own_tables
        try:
            message = _message(name, own, own_tables)
            result = self.meetings.meet(message, _limit(own, message.tensors))
        except LinkLostError as error:
            if STOPPING not in own:
                raise Preempted from error
            return own | {STOPPING: 1.0}, own_tables
        except BehindError as error:
            raise LeftBehind from error
        return result.header["sums"] | _only(own, STOPPING), _named(result, TABLE) | _by_rank(own_tables)

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        key = _training(round)
        own, own_tables = collectives.all_reduce_scalars(scalars, tables)
        met = perf_counter()
        if own[UNFINISHED]:  # this site leaves, and brings its round when it is back
            return Combined(own, own_tables, None, met)
        self.transport.start_round(round.seed_for)
        vectors = session.contribution()
        sent = self.transport.encode(vectors)
        try:
            expected = {**_message(key, own, own_tables).tensors, **_prefixed(VECTOR, algorithm.global_state())}
            result = self.meetings.meet(_message(key, own, own_tables, sent), Limit.like(own, expected))
        except LinkLostError:
            return Combined(own | {STOPPING: 1.0}, own_tables, None, met)
        except BehindError as error:
            raise LeftBehind from error
        if self.name not in result.header["counted"]:
            raise LeftBehind
        self.transport.commit(vectors, sent)
        algorithm.load_global_state(_named(result, VECTOR))
        self.transport.bytes_sent = result.header["bytes"]
        sums = result.header["sums"] | _only(own, STOPPING)
        return Combined(sums, _named(result, TABLE) | _by_rank(own_tables), result.header["metrics"], met)

    def _meet(self, message: Message, limit: Limit) -> Message:
        try:
            return self.meetings.meet(message, limit)
        except LinkLostError as error:
            raise Preempted from error


class CoordinatorExchange:
    """The coordinator's end: a silo without clients, that merges what the sites bring.

    Args:
        gatherings: the members.
        topology: of this process, in the federation.
        compression: of the sites' updates.
        layout: the start and shape of each parameter in a vector.
    """

    averages_personal = False

    def __init__(
        self,
        gatherings: Gatherings,
        topology: Topology,
        compression: UpdateCompression,
        layout: Sequence[tuple[int, torch.Size]],
    ):
        self.gatherings, self.compression = gatherings, compression
        self.transport: Transport = AllReduce(topology.alone())
        self._make_state: Callable[[], Message] | None = None

    def start(self, parallel: ParallelModel, digests: tuple[int, int]) -> int:
        result = Message({"digests": list(digests)}, _pack(_start_tensors(parallel.module)))
        self.gatherings.publish(START, result)
        return digests[0]

    def catch_up(self, rounds: int, make_state: Callable[[], Tree]) -> Tree | None:
        def message() -> Message:
            leaves = dict(iter_leaves(make_state()))
            tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
            return Message({"values": {name: leaves[name] for name in leaves.keys() - tensors.keys()}}, tensors)

        self._make_state = message
        return None

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        brought = self._gather(name, scalars, tables)
        if brought is None:
            if STOPPING not in scalars:
                raise Preempted
            return dict(scalars) | {STOPPING: 1.0}, dict(tables)
        sums, tables = _total(scalars, tables, brought)
        self.gatherings.publish(name, _message(name, sums, tables))
        return sums, tables

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        key = _training(round)
        like = session.contribution_like(clients=1)
        brought = self._gather(key, scalars, tables, upload_like(self.compression, like))
        met = perf_counter()
        if brought is None:
            return Combined(dict(scalars) | {STOPPING: 1.0}, dict(tables), None, met)
        for name, message in brought.items():
            self.transport.bytes_sent += _num_bytes(_named(message, VECTOR).values())
            vectors, reason = self._decoded(message, like)
            if reason:
                brought[name], vectors = Message({"sums": {LEFT_OUT: 1.0}}), {}
            elif message.header["sums"][LEFT_OUT]:
                reason = "the update of its client is not finite"
            if reason:
                print(f"{name} is left out of round {round.index + 1}: {reason}", file=sys.stderr, flush=True)
            session.merge(vectors, session.planned_weight)
        sums, tables = _total(scalars, tables, brought)
        metrics = session.aggregate(sums)
        state = algorithm.global_state()
        self.transport.bytes_sent += len(brought) * _num_bytes(state.values())
        header = {"metrics": metrics, "bytes": self.transport.bytes_sent}
        self.gatherings.publish(key, _message(key, sums, tables, state, header))
        return Combined(sums, tables, metrics, met)

    def _decoded(self, message: Message, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """Return the vectors of a site, and why its numbers cannot be combined with those of others, or nothing."""
        try:
            vectors = decode_upload(self.compression, _named(message, VECTOR), like)
        except ValueError as error:
            return {}, str(error)
        return vectors, broken_numbers(Message(message.header, {**message.tensors, **_prefixed(VECTOR, vectors)}))

    def _gather(
        self,
        key: str,
        scalars: Iterable[str],
        tables: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Message] | None:
        """Gather messages with scalars of these names and tables like these, and vectors like these or none."""
        limit = _limit(scalars, _message(key, {}, tables).tensors, _prefixed(VECTOR, vectors))
        return self.gatherings.gather(key, limit, self._make_state)


def broken_numbers(message: Message) -> str:
    """Return why the numbers of a site cannot be combined with those of others; empty if they can."""
    sums = message.header["sums"]
    for name in (name for name in WEIGHTS if sums.get(name, 0.0) < 0):
        return f"its {name} is {sums[name]:g}"
    for name in (name for name, number in sums.items() if name not in FIGURES and not math.isfinite(number)):
        return f"its {name} is {sums[name]:g}"
    for name, tensor in message.tensors.items():
        if name not in FIGURES and tensor.is_floating_point() and not _is_finite(tensor):
            return f"its {name.partition('/')[2]} is not finite"
    return ""


def _is_finite(tensor: Tensor) -> bool:
    # Without a tensor of as many truth values. Both are NaN if an element is.
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _training(round: Round) -> str:
    return f"rounds/{round.index}{TRAINING}"


def _start_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that members begin with alike: parameters that are trained, and buffers."""
    return [*(parameter for parameter in module.parameters() if parameter.requires_grad), *module.buffers()]


def _pack(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return these tensors as one vector of each dtype."""
    dtypes = {str(tensor.dtype): tensor.dtype for tensor in tensors}
    return {
        name: torch.cat([tensor.detach().flatten() for tensor in tensors if tensor.dtype == dtype])
        for name, dtype in dtypes.items()
    }


@torch.no_grad()
def _unpack(tensors: Sequence[Tensor], packed: Mapping[str, Tensor]) -> None:
    """Copy what `_pack` has returned for other tensors of these shapes into these."""
    begins = dict.fromkeys(packed, 0)
    for tensor in tensors:
        name = str(tensor.dtype)
        begin = begins[name]
        begins[name] = begin + tensor.numel()
        tensor.copy_(packed[name][begin : begins[name]].view_as(tensor))


def _message(
    key: str,
    sums: Mapping[str, float],
    tables: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor] = MappingProxyType({}),
    header: Mapping[str, Any] = MappingProxyType({}),
) -> Message:
    sent = {name: table[table.any(1)] if name.endswith(ROWS) else table for name, table in tables.items()}
    named = _prefixed(TABLE, {name: table for name, table in sent.items() if name not in _by_rank(tables)})
    named |= _prefixed(VECTOR, vectors)
    return Message({"key": key, "sums": dict(sums), **header}, named)


def _limit(
    scalars: Iterable[str], tensors: Mapping[str, Tensor], optional: Mapping[str, Tensor] = MappingProxyType({})
) -> Limit:
    """Return the limit of messages like these, whose tables of rows have any number of them."""
    limit = Limit.like(scalars, tensors, optional)
    rows = {name: (each.dtype, (None, *each.shape[1:])) for name, each in tensors.items() if name.endswith(ROWS)}
    return (
        replace(limit, max_bytes=limit.max_bytes + ROWS_BYTES, tensors={**(limit.tensors or {}), **rows})
        if rows
        else limit
    )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _named(message: Message, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a message whose names begin with this, without it."""
    return {name.removeprefix(prefix): each for name, each in message.tensors.items() if name.startswith(prefix)}


def _by_rank(tables: Mapping[str, Tensor]) -> Tables:
    """Return the tables that each launch has for itself."""
    return {name: table for name, table in tables.items() if name.startswith(RANKS)}


def _only(scalars: Mapping[str, float], name: str) -> Scalars:
    return {name: scalars[name]} if name in scalars else {}


def _total(
    scalars: Mapping[str, float], tables: Mapping[str, Tensor], brought: Mapping[str, Message]
) -> tuple[Scalars, Tables]:
    """Return the sums over the coordinator and the members, but for what is the coordinator's own."""
    sums, summed = dict(scalars), dict(tables)
    for message in brought.values():
        for name, value in message.header["sums"].items():
            if name not in (STOPPING, OUT_OF_TIME):
                sums[name] += value
        for name, table in _named(message, TABLE).items():
            summed[name] = torch.cat((summed[name], table)) if name.endswith(ROWS) else summed[name] + table
    return sums, summed
