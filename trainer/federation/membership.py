"""The part of a launch in a federation: a site with data of its own, or the coordinator that has none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.data import DataSplits
from trainer.data.loading.silo_files import DatasetInfo, join_clients
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.federation.certificates import load_credentials
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.link import COORDINATOR, Link, LinkLostError, LinkRefusedError
from trainer.federation.messages import Message
from trainer.federation.options import SiteOptions
from trainer.federation.registry import POLL_SECONDS, RefusedError, Registry
from trainer.federation.server import Server
from trainer.loop.exchange import ExchangeFactory
from trainer.loop.stopping import Preempted
from trainer.utils.text import format_value
from trainer.utils.trees import flatten

MEMBERS = "members"  # the meeting at which sites learn how many examples the others have
# Choices that may differ between the members.
OWN_KEYS = ("site.", "launch.", "data.", "run_dir", "require_shared_run_dir", "resume", "name", "run.", "checkpoint.")
COMPARED_KEYS = ("data.validation",)
MAX_DIFFERENCES = 10  # shown
MAX_BYTES = 1 << 40


class Membership(Protocol):
    """The part of this launch in a federation."""

    make_exchange: ExchangeFactory

    def topology(self, world: Topology) -> Topology:
        """Return this rank's topology in the federation."""
        ...

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        """Return the data of all members, of which this launch has its own. A collective of its ranks."""
        ...


@contextmanager
def open_membership(
    options: SiteOptions, tree: Mapping[str, Any], world: Topology, is_stopping: Callable[[], bool]
) -> Iterator[Membership]:
    """Open the links of this launch, and close them with the block.

    Args:
        options: who this launch is.
        tree: the configuration, which members compare.
        world: the ranks of this launch.
        is_stopping: whether this process is asked to stop.
    """
    if options.listen is not None:
        coordinator = Coordinator(options, tree, is_stopping)
        try:
            yield coordinator
        finally:
            coordinator.server.stop()
        return
    site = Site(options, tree, world, is_stopping)
    if site.link is None:
        yield site
        return
    with site.link.present():
        yield site


class Coordinator:
    """The launch that all sites dial. It admits those whose configuration is its own."""

    def __init__(self, options: SiteOptions, tree: Mapping[str, Any], is_stopping: Callable[[], bool]):
        assert options.listen is not None
        self.members, self.is_stopping = list(options.members), is_stopping
        self.settings = _compared(tree)
        self.registry = Registry(self.members, options.grace_seconds, options.min_members)
        self.infos: dict[str, DatasetInfo] = {}
        self.has_joined = threading.Condition()
        credentials = load_credentials(Path(str(options.certificates)).expanduser(), COORDINATOR)
        self.server = Server(options.listen, credentials, self.registry, self)
        self.make_exchange: ExchangeFactory = partial(CoordinatorExchange, self)

    def topology(self, world: Topology) -> Topology:
        silos = len(self.members) + 1  # it is one without clients
        return replace(world, silo=silos - 1, silo_sizes=(1,) * silos)

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        with self.has_joined:
            while len(self.infos) < len(self.members):
                if self.is_stopping():
                    raise Preempted
                self.has_joined.wait(POLL_SECONDS)
        infos = [self.infos[name] for name in self.members]
        self.registry.publish(MEMBERS, Message({"infos": list(map(asdict, infos)), "members": self.members}))
        return join_clients(self.members, range(len(self.members)), {}, infos)

    def admit(self, name: str, header: dict[str, Any]) -> dict[str, Any]:
        """Check what a site says of itself; raise RefusedError if it cannot take part."""
        if name not in self.members:
            raise RefusedError(f"{name} is no member\n  valid: {', '.join(self.members)}")
        differences = [
            f"{key}={format_value(header['settings'].get(key))}, but the coordinator has {format_value(value)}"
            for key, value in self.settings.items()
            if header["settings"].get(key) != value
        ]
        if differences:
            raise RefusedError("\n".join(differences[:MAX_DIFFERENCES]) + "\n  set the same on both sides")
        info = DatasetInfo(**header["info"])
        with self.has_joined:
            known = self.infos.setdefault(name, info)
            self.has_joined.notify_all()
        if known != info:
            raise RefusedError(f"the examples of {name} are not those with which it has joined before")
        self.registry.enter(name, str(header["session"]))
        return {}

    def max_bytes(self, name: str) -> int:
        return MAX_BYTES

    def gather(self, key: str) -> Mapping[str, Message] | None:
        return self.registry.gather(key, self.is_stopping)

    def publish(self, key: str, result: Message) -> None:
        self.registry.publish(key, result)


class Site:
    """A launch with data of its own. Its first rank talks to the coordinator."""

    def __init__(self, options: SiteOptions, tree: Mapping[str, Any], world: Topology, is_stopping: Callable[[], bool]):
        assert options.name is not None and options.server is not None
        self.name, self.settings, self.link = options.name, _compared(tree), None
        if world.rank == 0:
            credentials = load_credentials(Path(str(options.certificates)).expanduser(), options.name)
            self.link = Link(options.server, credentials, options.retry_seconds, is_stopping)
        self.make_exchange: ExchangeFactory = partial(SiteExchange, self)
        self.members: list[str] = []

    def topology(self, world: Topology) -> Topology:
        place = self.members.index(self.name)
        sizes = [world.world_size if silo == place else 1 for silo in range(len(self.members) + 1)]
        return replace(world, silo=place, silo_sizes=tuple(sizes))

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        splits = collectives.on_all_ranks(read)
        header = {"settings": self.settings, "info": asdict(DatasetInfo.of(splits))}
        self._on_leader(lambda link: link.join(header))
        result = self._on_leader(lambda link: link.meet(Message({"key": MEMBERS}), 0))
        self.members = result.header["members"]
        infos = [DatasetInfo(**info) for info in result.header["infos"]]
        return join_clients(self.members, range(len(self.members)), {self.members.index(self.name): splits}, infos)

    def meet(self, message: Message) -> Message:
        """Bring a message to a meeting; return the result on all ranks of the site. A collective."""
        return self._on_leader(lambda link: link.meet(message, MAX_BYTES))

    def _on_leader(self, call: Callable[[Link], Message]) -> Message:
        """Return the result of a call of the first rank on all ranks; or raise its error on all."""
        result: Message | None = None
        outcome: dict[str, Any] = {}
        if self.link:
            try:
                result = call(self.link)
                outcome = {"header": result.header}
            except LinkRefusedError as error:
                outcome = {"refused": str(error)}
            except LinkLostError as error:
                outcome = {"lost": str(error)}
        if result:
            outcome["tensors"] = [[name, str(each.dtype), list(each.shape)] for name, each in result.tensors.items()]
        outcome = json.loads(collectives.broadcast_text(json.dumps(outcome)))
        if "refused" in outcome:
            raise ValueError(outcome["refused"])
        if "lost" in outcome:
            raise Preempted(outcome["lost"])
        tensors = result.tensors if result else _empty(outcome["tensors"])
        return Message(outcome["header"], {name: collectives.broadcast(each) for name, each in tensors.items()})


def _compared(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that all members must have made alike, by their dotted keys."""
    return {key: value for key, value in flatten(tree).items() if key in COMPARED_KEYS or not key.startswith(OWN_KEYS)}


def _empty(described: Sequence[tuple[str, str, list[int]]]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch."))) for name, dtype, shape in described
    }
