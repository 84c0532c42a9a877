"""The part of a launch in a federation: a site with data of its own, or the coordinator that has none."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import JsonValue
from pydantic.dataclasses import dataclass

from trainer.checkpoint.files import write_text
from trainer.checkpoint.resume import resumable_rounds
from trainer.checkpoint.run_dir import CHANGEABLE_KEYS
from trainer.data import DataSplits
from trainer.data.loading.silo_files import DatasetInfo, join_clients, kind_error, with_central
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.federation.agreement import CoordinatorAgreement, SiteAgreement
from trainer.federation.certificates import Credentials, load_credentials
from trainer.federation.disclosure import Disclosure
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.link import BehindError, Link, LinkLostError, LinkRefusedError, StoppedError
from trainer.federation.messages import HEADER, Layout, Limit, Message, Name, parse_header
from trainer.federation.options import COORDINATOR, Figure, SiteOptions
from trainer.federation.registry import POLL_SECONDS, RefusedError, Registry
from trainer.federation.server import Server
from trainer.federation.spool import OF_END, Spool, round_of
from trainer.loop.exchange import ExchangeFactory
from trainer.loop.stopping import Preempted
from trainer.utils.text import format_value
from trainer.utils.trees import flatten

log = logging.getLogger(__name__)

END = f"{OF_END}run"  # the meeting after which nobody needs the coordinator any more
# Choices that may differ between the members: where and how each runs, its own files, and where its metrics go.
OWN_KEYS = (*CHANGEABLE_KEYS, "site.", "data.", "loggers", "clients", "model.init", "model.path", "task.teacher")
COMPARED_KEYS = ("data.validation", "metrics.per_client", "metrics.client_scores", "max_nonfinite_rounds")
SITES = "the sites"  # that have data, in errors
MAX_DIFFERENCES = 10  # shown
NEWS_SECONDS = 1.0  # after which a rank that waits for the coordinator lets the others of its site know
LINK_ERRORS = (LinkRefusedError, LinkLostError, StoppedError, BehindError)


@dataclass(frozen=True, config=HEADER)
class Joining:
    """A site's description of itself.

    Attributes:
        settings: the choices that all members must have made alike, by their dotted keys.
        info: describes its data.
        withheld: the figures that it keeps to itself.
    """

    settings: dict[Name, JsonValue]
    info: DatasetInfo
    withheld: list[Figure]


@dataclass(frozen=True, config=HEADER)
class Welcome:
    """The coordinator's description of all members.

    Attributes:
        members: the names of all, in the order in which sums are made.
        infos: describe their data.
        has_central: whether the coordinator has a test set of its own.
    """

    members: list[Name]
    infos: list[DatasetInfo]
    has_central: bool = False


class Membership(Protocol):
    """The part of this launch in a federation.

    Attributes:
        notice: what its user is to know before it joins.
    """

    make_exchange: ExchangeFactory
    notice: str

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        """Return the data of all members, of which this launch has its own. A collective of its ranks."""
        ...

    def topology(self, world: Topology) -> Topology:
        """Return this rank's topology in the federation, which it has joined."""
        ...

    def finish(self) -> None:
        """Take part in the end of a run that is finished here. A collective of this launch's ranks.

        Raises:
            Preempted: this process is asked to stop before others have what they need of it.
        """
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
    with ExitStack() as stack:
        if options.listen is None:
            yield Site(options, tree, world, is_stopping, stack)
        else:
            coordinator = Coordinator(options, tree, is_stopping)
            stack.callback(coordinator.close)
            if options.monitor is not None:
                stack.enter_context(coordinator.monitored(options.monitor))
            yield coordinator


class Coordinator:
    """The launch that all sites dial. It admits those whose configuration is its own."""

    def __init__(self, options: SiteOptions, tree: Mapping[str, Any], is_stopping: Callable[[], bool]):
        assert options.listen is not None
        self.members, self.is_stopping = list(options.members), is_stopping
        self.settings = _compared(tree)
        # In a simulation data.path= is that of the sites.
        self.has_data = flatten(tree).get("data.path") is not None and options.simulate is None
        folder = Path(tree["run_dir"])
        spool = Spool(folder / "meetings")
        self.saved = partial(resumable_rounds, folder / "checkpoints")
        self.registry = Registry(spool, self.members, options.grace_seconds, options.quorum, self.saved)
        self.has_ended, self._farewell_seconds = False, options.retry_seconds  # as long as a site looks for this launch
        self._away: set[str] = set()  # those who were not counted in the last meeting
        self.infos_file = spool.folder / "members.json"
        self.infos = _read_infos(self.infos_file)
        self.has_joined = threading.Condition()
        self._make_state: Callable[[], Message] | None = None  # as the last gathering had it
        self.server = Server(options.listen, _credentials(options, COORDINATOR), self.registry, self)
        self.make_exchange: ExchangeFactory = partial(CoordinatorExchange, self)
        self.notice = f"listens at {options.listen} for {', '.join(self.members)}"

    def monitored(self, listen: str) -> AbstractContextManager[object]:
        """Return what answers questions about this coordinator at an address, while its block runs."""
        from trainer.federation.monitor import Meter, Monitor  # with prometheus_client, which others do without

        meter = Meter(self, self.registry, self.server, self.saved())
        self.make_exchange = partial(CoordinatorExchange, meter)
        return Monitor(listen, meter)

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        own = read() if self.has_data else None
        with self.has_joined:
            while self._missing():
                if self.is_stopping():
                    raise Preempted
                self.has_joined.wait(POLL_SECONDS)
        infos = [self.infos[name] for name in self.members]
        homes = range(len(self.members))
        joined = join_clients(SITES, self.members, homes, {}, infos, CoordinatorAgreement(self))
        return with_central(joined, own, self.members[0], infos[0]) if own else joined

    def topology(self, world: Topology) -> Topology:
        silos = len(self.members) + 1  # it is one without clients
        return replace(world, silo=silos - 1, silo_sizes=(1,) * silos)

    def finish(self) -> None:
        if self.registry.gather(END, Limit(), self._make_state, self.is_stopping, self._farewell_seconds) is None:
            raise Preempted
        self.publish(END, Message({}))
        self.has_ended = True

    def close(self) -> None:
        """Hang up; after the end of the run remove what members have brought, for which nobody will ask any more."""
        self.server.stop()
        if self.has_ended:
            self.registry.spool.remove()

    def admit(self, name: str, header: Mapping[str, Any]) -> None:
        if name not in self.members:
            raise RefusedError(f"{name} is no member\n  valid: {', '.join(self.members)}")
        said = parse_header(Joining, header)
        differences = [
            f"{key}={format_value(said.settings.get(key))}, but the coordinator has {format_value(value)}"
            for key, value in self.settings.items()
            if said.settings.get(key) != value
        ]
        if differences:
            raise RefusedError("\n".join(differences[:MAX_DIFFERENCES]) + "\n  set the same on both sides")
        with self.has_joined:
            known = {**self.infos, name: said.info}
            if error := kind_error(SITES, list(known), list(known.values())):
                raise RefusedError(error)
            if self.infos.get(name, said.info) != said.info:
                raise RefusedError(f"the examples of {name} are not those with which it has joined before")
            if said.withheld and name not in self.infos:
                print(f"{name} keeps to itself: {', '.join(said.withheld)}", flush=True)
            self.infos = known
            write_text(self.infos_file, json.dumps({each: asdict(self.infos[each]) for each in self.infos}))
            self.has_joined.notify_all()

    def welcome(self) -> Message | None:
        with self.has_joined:
            if self._missing():
                return None
            infos = [asdict(self.infos[name]) for name in self.members]
            return Message({"members": self.members, "infos": infos, "has_central": self.has_data})

    def gather(self, key: str, limit: Limit, make_state: Callable[[], Message] | None) -> dict[str, Message] | None:
        self._make_state = make_state
        brought = self.registry.gather(key, limit, make_state, self.is_stopping)
        if brought is not None:
            self._note_counted(key, brought)
        return brought

    def publish(self, key: str, result: Message) -> None:
        self.registry.publish(key, result)

    def _note_counted(self, key: str, brought: Mapping[str, Message]) -> None:
        """Log who is counted, and print who is not any more, or again."""
        log.info("%s: counted are %s", key, ", ".join(brought))
        index, away = round_of(key), set(self.members) - set(brought)
        where = key if index is None else f"round {index + 1}"
        for name in sorted(away - self._away):
            print(f"{where}: {name} is away, the others go on", file=sys.stderr, flush=True)
        for name in sorted(self._away - away):
            print(f"{where}: {name} is back", file=sys.stderr, flush=True)
        self._away = away

    def _missing(self) -> list[str]:
        return [name for name in self.members if name not in self.infos]


class Site:
    """A launch with data of its own. Its first rank talks to the coordinator."""

    def __init__(
        self,
        options: SiteOptions,
        tree: Mapping[str, Any],
        world: Topology,
        is_stopping: Callable[[], bool],
        stack: ExitStack,
    ):
        assert options.name is not None and options.server is not None
        self.name, self.settings, self.link, self.stack = options.name, _compared(tree), None, stack
        self.checkpoints = Path(tree["run_dir"]) / "checkpoints"
        if world.rank == 0:
            self.link = Link(options.server, _credentials(options, options.name), options.retry_seconds, is_stopping)
        self.disclosure = Disclosure(options.allow, names_clients=tree["metrics"]["per_client"] != "none")
        self.make_exchange: ExchangeFactory = partial(SiteExchange, self, options.name)
        self.notice = "\n".join([f"leaves {self.name}, for {options.server}:", *self.disclosure.lines()])
        self.members: list[str] = []

    def join(self, read: Callable[[], DataSplits]) -> DataSplits:
        splits = collectives.on_all_ranks(read)
        info = DatasetInfo.of(splits)
        said = asdict(replace(info, checksum=0))  # by which one could tell whether it has the examples that one knows
        header = {"settings": self.settings, "info": said, "withheld": self.disclosure.withheld}
        try:
            welcome = self._on_leader(lambda link: self.stack.enter_context(link.joined(header)))
        except LinkLostError as error:
            raise Preempted from error
        known = parse_header(Welcome, welcome.header)
        self.members, place = known.members, known.members.index(self.name)
        infos = [info if each == place else other for each, other in enumerate(known.infos)]
        homes = range(len(self.members))
        joined = join_clients(SITES, self.members, homes, {place: splits}, infos, SiteAgreement(self))
        joined.has_central = known.has_central
        return joined

    def topology(self, world: Topology) -> Topology:
        place = self.members.index(self.name)
        sizes = [world.world_size if silo == place else 1 for silo in range(len(self.members) + 1)]
        return replace(world, silo=place, silo_sizes=tuple(sizes))

    def finish(self) -> None:
        try:
            self.meet(Message({"key": END}), Limit())
        except StoppedError as error:
            raise Preempted from error
        except LinkLostError:  # the run is finished here, whatever became of the coordinator
            log.info("the coordinator did not hear of the end of this site")

    def meet(self, message: Message, limit: Limit) -> Message:
        message = self.disclosure.reduce(message)
        saved = resumable_rounds(self.checkpoints)
        message = Message({**message.header, "saved": saved}, message.tensors)
        return self._on_leader(lambda link: link.meet(message, limit))

    def newest(self, rounds: int, limit: Limit) -> Message | None:
        result = self._on_leader(lambda link: link.fetch(Message({"rounds": rounds}), limit))
        return result if result.tensors else None

    def _on_leader(self, call: Callable[[Link], Message]) -> Message:
        """Return the result of a call of the first rank on all ranks; or raise its error on all."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(call, self.link) if self.link else None
            outcome: dict[str, Any] = {}
            while not outcome:  # the others hear of the first rank while it waits, lest they take it to be dead
                outcome = json.loads(collectives.broadcast_text(json.dumps(_outcome(future))))
        for kind in LINK_ERRORS:
            if kind.__name__ in outcome:
                raise kind(outcome[kind.__name__])
        layout = Layout.from_json(outcome["layout"])
        content = future.result().content if future else torch.empty(layout.num_bytes, dtype=torch.uint8)
        assert content is not None
        return Message(outcome["header"], layout.views(collectives.broadcast(content) if len(content) else content))


def _outcome(future: Future[Message] | None) -> dict[str, Any]:
    """Return what the other ranks need to know of the message or the error of a call; nothing while it lasts."""
    if future is None or not wait([future], NEWS_SECONDS).done:
        return {}
    try:
        result = future.result()
    except LINK_ERRORS as error:
        return {type(error).__name__: str(error)}
    layout = [(name, each.dtype, list(each.shape)) for name, each in result.tensors.items()]
    return {"header": result.header, "layout": Layout(layout).to_json()}


def _credentials(options: SiteOptions, name: str) -> Credentials:
    """Load the certificates of a member, and warn if they expire soon."""
    credentials = load_credentials(Path(str(options.certificates)).expanduser(), name)
    if warning := credentials.expiry_warning():
        print(warning, file=sys.stderr, flush=True)
    return credentials


def _read_infos(file: Path) -> dict[str, DatasetInfo]:
    """Return what members have said of their data; empty before they have."""
    if not file.exists():
        return {}
    return {name: DatasetInfo.from_tree(info) for name, info in json.loads(file.read_text()).items()}


def _compared(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that all members must have made alike, by their dotted keys."""
    return {key: value for key, value in flatten(tree).items() if key in COMPARED_KEYS or not key.startswith(OWN_KEYS)}
