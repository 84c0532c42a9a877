"""Federations whose members are threads of one process, which meet in memory."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from tests.cli.command import ROOT
from tests.laws.cases import SIZES, Outcome, Records, case_run, outcome
from trainer.data import DataSplits, Source, TensorSource
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.membership import open_membership
from trainer.federation.messages import Layout, Limit, Message
from trainer.federation.options import SiteOptions
from trainer.loop.checkpointing import make_checkpointer
from trainer.loop.exchange import ExchangeFactory, InWorld
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState

SECONDS = 100  # of a wait for another member


class Hall:
    """Where members meet. One of them works at a time: torch's default generators are those of all threads.

    Attributes:
        names: of the sites.
        brought: the messages by meeting and site.
        results: of the meetings.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.brought: defaultdict[str, dict[str, Message]] = defaultdict(dict)
        self.results: dict[str, Message] = {}
        self.errors: list[BaseException] = []
        self.changed = threading.Condition()

    def run(self, works: Iterable[Callable[[], None]]) -> None:
        """Do the works of all members, each in a thread; raise the first error."""
        threads = [threading.Thread(target=self._work, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def gather(self, key: str, limit: Limit, make_state: Any) -> dict[str, Message]:
        """Wait for the messages of all sites."""
        brought = self.brought[key]
        self.wait_until(lambda: len(brought) == len(self.names))
        for message in brought.values():
            check(limit, message)
        return {name: brought[name] for name in self.names}

    def publish(self, key: str, result: Message) -> None:
        """Give the sites a result."""
        self.results[key] = as_sent({**result.header, "counted": self.names}, result.tensors)
        self.changed.notify_all()

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Let others work until something has happened."""
        assert self.changed.wait_for(lambda: is_done() or bool(self.errors), SECONDS)
        assert is_done(), "another member has failed"

    def _work(self, work: Callable[[], None]) -> None:
        with self.changed:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
            self.changed.notify_all()


@dataclass(frozen=True)
class Door:
    """The hall, as a site sees it."""

    hall: Hall
    name: str

    def meet(self, message: Message, limit: Limit) -> Message:
        """Bring a message, and wait for the result."""
        key = message.header["key"]
        self.hall.brought[key][self.name] = as_sent(message.header, message.tensors)
        self.hall.changed.notify_all()
        self.hall.wait_until(lambda: key in self.hall.results)
        check(limit, self.hall.results[key])
        return self.hall.results[key]

    def newest(self, rounds: int, limit: Limit) -> None:
        """Return None: nobody is late."""


def as_sent(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Message:
    """Return a message that has nothing in common with the sender's memory."""
    return Message(json.loads(json.dumps(header)), {name: tensor.clone() for name, tensor in tensors.items()})


def check(limit: Limit, message: Message) -> None:
    """Raise MessageError if a message holds anything else than it may."""
    layout = [(name, tensor.dtype, list(tensor.shape)) for name, tensor in message.tensors.items()]
    limit.check(message.header, Layout(layout))


@dataclass(frozen=True)
class Federation:
    """The results of a federation: the outcomes of the sites and of the coordinator, and what they have brought."""

    sites: list[Outcome]
    coordinator: Outcome
    results: list[dict[str, Any]]
    hall: Hall


def over_sites(
    name: str, choices: Mapping[str, Any], folder: Path | None = None, until: int | None = None
) -> Federation:
    """Run a row of the table with a site for each client.

    Args:
        name: of the row.
        choices: of the run.
        folder: has the checkpoints of all members, from which they continue; None: there are none.
        until: the number of rounds after which all members leave.
    """
    count = len(choices.get("sizes", SIZES))
    hall = Hall([f"site-{client}" for client in range(count)])
    outcomes: dict[int, tuple[Outcome, dict[str, Any]]] = {}
    with distributed(device="cpu") as world:

        def work(silo: int, make_exchange: ExchangeFactory) -> None:
            topology = replace(world, silo=silo, silo_sizes=(1,) * (count + 1))
            run = at_home(case_run(topology, name, choices))
            outcomes[silo] = fitted(run, make_exchange, folder and folder / str(silo), until)

        makers: list[Any] = [partial(SiteExchange, Door(hall, site), site) for site in hall.names]
        works = enumerate([*makers, partial(CoordinatorExchange, hall)])
        hall.run(partial(work, silo, make_exchange) for silo, make_exchange in works)
    *sites, coordinator = (outcomes[silo][0] for silo in range(count + 1))
    return Federation(sites, coordinator, [outcomes[silo][1] for silo in range(count + 1)], hall)


def at_home(run: Run) -> Run:
    """Return the run in which each client belongs to the silo of its number."""
    return replace(run, clients=replace(run.clients, homes=tuple(range(len(run.clients)))))


def fitted(
    run: Run, make_exchange: ExchangeFactory = InWorld, folder: Path | None = None, until: int | None = None
) -> tuple[Outcome, dict[str, Any]]:
    """Train a run to its end, or for some rounds; return the outcome and the result."""
    states: list[TrainState] = []
    records = Records()
    checkpointer = folder and make_checkpointer(run, folder)
    resume_point = checkpointer and checkpointer.latest()
    result = fit(
        run,
        [records],
        checkpointer,
        resume_point,
        on_start=states.append,
        until=until,
        make_exchange=make_exchange,
    )
    return outcome(states[0], records.rounds), result.metrics


def in_one_silo(name: str, choices: Mapping[str, Any]) -> tuple[Outcome, dict[str, Any]]:
    """Run a row of the table in one silo, which trains its clients one after the other."""
    with distributed(device="cpu") as topology:
        return fitted(case_run(topology, name, choices))


def at_silo(name: str, choices: Mapping[str, Any], silos: SiloSpec) -> tuple[Outcome, dict[str, Any]]:
    """Run a row of the table in one world, with a client for each silo; each rank calls this."""
    with distributed(silos, device="cpu") as topology:
        return fitted(at_home(case_run(topology, name, choices)))


def split_of(run: Run, client: int) -> DataSplits:
    """Return the examples of one client, as its site reads them."""

    def select(source: Source, ids: np.ndarray) -> TensorSource:
        inputs, targets = source.fetch(torch.from_numpy(ids))
        assert isinstance(inputs, Tensor) and isinstance(targets, Tensor)
        return TensorSource(inputs, targets)

    data, clients = run.data, run.clients
    return DataSplits(select(data.train, clients.train[client]), select(data.test, clients.test[client]), data.classes)


def options(certificates: Path, **given: Any) -> SiteOptions:
    """Return the options of a member that waits for the others as long as it takes."""
    defaults = yaml.safe_load((ROOT / "conf/config.yaml").read_text())["site"]
    return SiteOptions(**defaults | {"certificates": str(certificates), "grace_seconds": None} | given)


def as_member(
    site: SiteOptions,
    name: str,
    choices: Mapping[str, Any],
    folder: Path,
    on_open: Callable[[Any], Any] = id,
    is_stopping: Callable[[], bool] = bool,
) -> tuple[Outcome, dict[str, Any]]:
    """Run a row of the table as a launch of its own, over links; each rank of the launch calls this.

    Args:
        site: the part of the launch.
        name: of the row.
        choices: of the run.
        folder: of this launch.
        on_open: is called with the membership.
        is_stopping: whether this launch is asked to stop.
    """
    tree = {"run_dir": str(folder), "metrics": {"per_client": "full"}}
    with distributed(device="cpu") as world, open_membership(site, tree, world, is_stopping) as member:
        on_open(member)
        run = case_run(world, name, choices)
        client = int(site.name.removeprefix("site-")) if site.name else 0
        member.join(lambda: split_of(run, client))
        reached = fitted(at_home(replace(run, topology=member.topology(world))), member.make_exchange)
        member.finish()
        return reached
