"""How the silos of a federation come together: each site meets the others at the coordinator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.algorithms.base import RoundSession, RunSession
from trainer.algorithms.round import Round
from trainer.distributed.compression import UpdateCompression
from trainer.distributed.topology import Topology
from trainer.distributed.transport import Transport, make_transport
from trainer.federation.messages import Message
from trainer.loop.exchange import UNFINISHED, Combined, InWorld, Scalars, Tables

START = "start"  # the meeting at which sites get the initial model
STOPPING = "stopping"  # a scalar that is each launch's own
OUT_OF_TIME = "out_of_time"  # a scalar that is the coordinator's
TABLE, VECTOR = "table/", "vector/"  # begin the names of tensors in messages


class Meetings(Protocol):
    """The coordinator, as a site sees it."""

    def meet(self, message: Message) -> Message:
        """Bring a message to the meeting that its `key` names; return the result on all ranks. A collective."""
        ...


class Gatherings(Protocol):
    """The sites, as the coordinator sees them."""

    def gather(self, key: str) -> Mapping[str, Message] | None:
        """Return what the members have brought, in their order; None if this process is asked to stop."""
        ...

    def publish(self, key: str, result: Message) -> None:
        """Give the members the result of a meeting."""
        ...


class SiteExchange:
    """A site's end: sums go over its own ranks, and then its leader meets the others.

    Args:
        meetings: with the other members, at the coordinator.
        topology: of this rank, in the federation.
        compression: of updates.
        layout: the start and shape of each parameter in a vector.
    """

    def __init__(
        self,
        meetings: Meetings,
        topology: Topology,
        compression: UpdateCompression,
        layout: Sequence[tuple[int, torch.Size]],
    ):
        self.meetings = meetings
        self.world = InWorld(topology.alone(), compression, layout)
        self.transport: Transport = self.world.transport

    def start(self, module: nn.Module) -> None:
        result = self.meetings.meet(Message({"key": START}))
        load_module(module, result.tensors)

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        own, own_tables = self.world.sum(name, scalars, tables)
        if own.get(STOPPING):
            return own, own_tables
        result = self.meetings.meet(_message(name, own, own_tables))
        return result.header["sums"] | _only(own, STOPPING), _named(result, TABLE)

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        key = f"round/{round.index}"
        own, own_tables = self.world.sum(key, scalars, tables)
        met = perf_counter()
        if own[UNFINISHED]:  # this site leaves, and brings its round when it is back
            return Combined(own, own_tables, None, met)
        result = self.meetings.meet(_message(key, own, own_tables, session.contribution()))
        algorithm.load_global_state(_named(result, VECTOR))
        sums = result.header["sums"] | _only(own, STOPPING)
        return Combined(sums, _named(result, TABLE), result.header["metrics"], met)


class CoordinatorExchange:
    """The coordinator's end: a silo without clients, that merges what the sites bring.

    Args:
        gatherings: the members.
        topology: of this process, in the federation.
        compression: of updates.
        layout: the start and shape of each parameter in a vector.
    """

    def __init__(
        self,
        gatherings: Gatherings,
        topology: Topology,
        compression: UpdateCompression,
        layout: Sequence[tuple[int, torch.Size]],
    ):
        self.gatherings = gatherings
        self.transport: Transport = make_transport(topology.alone(), compression, layout)

    def start(self, module: nn.Module) -> None:
        self.gatherings.publish(START, Message({}, {name: each.clone() for name, each in module.state_dict().items()}))

    def sum(self, name: str, scalars: Scalars, tables: Mapping[str, Tensor]) -> tuple[Scalars, Tables]:
        brought = self.gatherings.gather(name)
        if brought is None:
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
        key = f"round/{round.index}"
        brought = self.gatherings.gather(key)
        met = perf_counter()
        if brought is None:
            return Combined(dict(scalars) | {STOPPING: 1.0}, dict(tables), None, met)
        for message in brought.values():
            session.merge(_named(message, VECTOR), session.planned_weight)
        sums, tables = _total(scalars, tables, brought)
        metrics = session.aggregate(sums)
        vectors = {name: vector.clone() for name, vector in algorithm.global_state().items()}
        self.gatherings.publish(key, _message(key, sums, tables, vectors, metrics))
        return Combined(sums, tables, metrics, met)


@torch.no_grad()
def load_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of these names."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(tensors[name])


def _message(
    key: str,
    sums: Mapping[str, float],
    tables: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Message:
    named = {f"{TABLE}{name}": table for name, table in tables.items()}
    named |= {f"{VECTOR}{name}": vector for name, vector in (vectors or {}).items()}
    return Message({"key": key, "sums": dict(sums), "metrics": metrics}, named)


def _named(message: Message, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a message whose names begin with this, without it."""
    return {name.removeprefix(prefix): each for name, each in message.tensors.items() if name.startswith(prefix)}


def _only(scalars: Mapping[str, float], name: str) -> Scalars:
    return {name: scalars[name]} if name in scalars else {}


def _total(
    scalars: Mapping[str, float], tables: Mapping[str, Tensor], brought: Mapping[str, Message]
) -> tuple[Scalars, Tables]:
    """Return the sums over the coordinator and the members, but for what is the coordinator's own."""
    sums, summed = dict(scalars), {name: table.clone() for name, table in tables.items()}
    for message in brought.values():
        for name, value in message.header["sums"].items():
            if name not in (STOPPING, OUT_OF_TIME):
                sums[name] += value
        for name, table in _named(message, TABLE).items():
            summed[name] += table
    return sums, summed
