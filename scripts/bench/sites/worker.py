"""The processes of the benchmark. Each answers, in JSON, the commands that come line by line; see `processes.py`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count, islice
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from scripts.bench.comm.combination import WIDTH, Rounds, average, one_step_rounds
from scripts.bench.sites.processes import FLOAT_BYTES
from trainer.algorithms import FedAvg
from trainer.algorithms.base import RoundSession, RunSession
from trainer.algorithms.round import Round
from trainer.data import DataSplits, TensorSource
from trainer.distributed.topology import Topology, distributed
from trainer.federation.membership import Coordinator, Membership, Site, open_membership
from trainer.federation.messages import VECTOR, Limit, Message
from trainer.federation.options import SiteOptions
from trainer.loop.exchange import Combined, InWorld, Scalars
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState

Options = Mapping[str, Any]

ROUNDS = 10**6  # none of them is the last
NANO = 1e-9
KEY = "rounds/{}/training"  # of a meeting


class Pipe:
    """Answers to the process that has started this one. All that others print goes to its errors."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(self, **values: Any) -> None:
        """Send an answer."""
        self.answers.write(json.dumps(values) + "\n")

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, to the end of the input."""
        for line in sys.stdin:
            yield line.split()


def python_seconds() -> float:
    """Return the processor time of this process without that of gRPC's own threads: for TLS, HTTP/2 and sockets.

    It is what remains of the whole, because threads of Python come and go, and those of gRPC stay.
    """
    threads = {thread.native_id for thread in threading.enumerate()}
    others = [task for task in Path("/proc/self/task").iterdir() if int(task.name) not in threads]
    return process_time() - NANO * sum(map(_nanoseconds, others))


def _nanoseconds(task: Path) -> int:
    """Return the processor time of a thread; 0 if it has just ended."""
    try:
        return int((task / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextmanager
def member(options: Options, world: Topology, name: str | None = None) -> Iterator[Membership]:
    """Be a site while the block runs, or the coordinator without a name."""
    defaults = yaml.safe_load(Path("conf/config.yaml").read_text())["site"]
    own = {"members": [], "certificates": options["certificates"], "grace_seconds": None, "retry_seconds": 60.0}
    own |= {"name": name, "server": options["address"]} if name else {}
    own |= {} if name else {"listen": options["address"], "members": options["members"]}
    known = {field.name for field in fields(SiteOptions)}
    chosen = SiteOptions(**{key: value for key, value in (defaults | own).items() if key in known})
    tree = {"run_dir": options["run_dir"], "metrics": {"per_client": "none"}}
    with open_membership(chosen, tree, world, lambda: False) as membership:
        yield membership


def no_data() -> DataSplits:
    """Return a data set of one example."""
    source = TensorSource(torch.zeros(1, WIDTH), torch.zeros(1, dtype=torch.int64))
    return DataSplits(source, source, 1)


def run_of(options: Options, topology: Topology) -> Run:
    """Return a run of FedAvg with a client for each member."""
    return one_step_rounds(topology, FedAvg(server=average), options["numbers"], ROUNDS, len(options["members"]))


def train_once(options: Options, world: Topology) -> Rounds:
    """Train a round as one of the members, alone; the memory of the libraries is there after it."""
    topology = replace(world, silo=0, silo_sizes=(1,) * (len(options["members"]) + 1))
    rounds = Rounds(run_of(options, topology), Recorder)
    rounds.train()
    rounds.combine()
    return rounds


def coordinator(pipe: Pipe, options: Options) -> None:
    """Merge what sites bring, round after round, until this process is killed."""
    torch.set_num_threads(os.cpu_count() or 1)  # a launch of one process has the machine
    with distributed(device="cpu") as world, member(options, world) as membership:
        assert isinstance(membership, Coordinator)
        train_once({**options, "numbers": WIDTH**2}, world)
        pipe.answer()
        membership.join(no_data)
        run = run_of(options, membership.topology(world))
        state = TrainState(run, make_exchange=membership.make_exchange)
        for index in range(ROUNDS):
            train_round(state, run.sample_round(index))
            membership.registry.spool.forget(KEY.format(index - 1))  # as if checkpoints had been written


def site(pipe: Pipe, options: Options) -> None:
    """Train a round of one step, and combine it with the other sites, for the commands `train` and `combine`."""
    with distributed(device="cpu") as world, member(options, world, options["name"]) as membership:
        train_once({**options, "numbers": WIDTH**2}, world)
        pipe.answer()
        membership.join(no_data)
        run = run_of(options, membership.topology(world))
        train_and_combine(pipe, Rounds(run, membership.make_exchange))


def rank(pipe: Pipe, options: Options) -> None:
    """Do the same as a silo of one world; sum a vector as long as the model for the command `all_reduce`."""
    os.environ |= options["environment"]
    with distributed(silos=len(options["members"]), device="cpu") as world:
        train_once({**options, "numbers": WIDTH**2}, world)
        pipe.answer()
        train_and_combine(pipe, Rounds(run_of(options, world)))


def train_and_combine(pipe: Pipe, rounds: Rounds) -> None:
    """Follow the commands of a site or a rank."""
    pipe.answer(bytes=rounds.state.model.shared.nbytes)
    vector: Tensor | None = None
    for (command,) in pipe.commands():
        if command == "train":
            rounds.train()
        elif command == "combine":
            rounds.combine()
        else:
            vector = torch.zeros_like(rounds.state.model.shared) if vector is None else vector
            dist.all_reduce(vector)
        pipe.answer()


def receiver(pipe: Pipe, options: Options) -> None:
    """For each command `up ROUND BYTES` or `down ROUND BYTES` take a message, and publish a result of as many bytes."""
    with distributed(device="cpu") as world, member(options, world) as membership:
        assert isinstance(membership, Coordinator)
        pipe.answer()
        membership.join(no_data)
        pipe.answer()
        for direction, index, size in pipe.commands():
            key = KEY.format(index)
            result = {"result": torch.rand(int(size) // FLOAT_BYTES)} if direction == "down" else {}
            used = Used()
            membership.gather(key, Limit(int(size)), None)
            came = monotonic()
            membership.publish(key, Message({"key": key}, result))
            pipe.answer(came=came, **used.since())


def sender(pipe: Pipe, options: Options) -> None:
    """For each command `up ROUND BYTES` or `down ROUND BYTES` bring a message of as many bytes, or of none."""
    pipe.answer()
    with distributed(device="cpu") as world, member(options, world, options["name"]) as membership:
        assert isinstance(membership, Site)
        membership.join(no_data)
        pipe.answer()
        for direction, index, size in pipe.commands():
            key = KEY.format(index)
            brought = {f"{VECTOR}delta": torch.rand(int(size) // FLOAT_BYTES)} if direction == "up" else {}
            used, began = Used(), monotonic()
            membership.meet(Message({"key": key}, brought), Limit(int(size)))
            pipe.answer(began=began, ended=monotonic(), **used.since())


class Used:
    """The processor time of this process from now on."""

    def __init__(self) -> None:
        self.began = process_time(), python_seconds()

    def since(self) -> dict[str, float]:
        """Return the seconds of all threads, and of Python's alone."""
        processor, python = self.began
        return {"processor": process_time() - processor, "python": python_seconds() - python}


def noise(pipe: Pipe, options: Options) -> None:
    """Bring N rounds of noise as each of several sites, threads of this process, for each command `run N`."""
    names: list[str] = options["names"]
    begins, ends, counts = threading.Barrier(len(names) + 1), threading.Barrier(len(names) + 1), list[int]()

    def work(name: str, world: Topology, template: Rounds) -> None:
        try:
            with member(options, world, name) as membership:
                membership.join(no_data)
                bring, indices = noisy(membership, world, template), count()
                while True:
                    begins.wait()
                    for index in islice(indices, counts[-1]):
                        bring(index)
                    ends.wait()
        finally:  # an error is that of all
            begins.abort()
            ends.abort()

    with distributed(device="cpu") as world:
        template = train_once(options, world)
        pipe.answer()
        for name in names:
            threading.Thread(target=work, args=(name, world, template), daemon=True).start()
        for _, number in pipe.commands():
            counts.append(int(number))
            begins.wait()
            ends.wait()
            pipe.answer()


def noisy(membership: Membership, world: Topology, template: Rounds) -> Callable[[int], object]:
    """Return a function that brings to a round what a site like this template would, but noise as its update."""
    run, recorder = template.run, template.state.exchange
    assert isinstance(recorder, Recorder)
    exchange = membership.make_exchange(membership.topology(world), run.update_compression, [])
    noise: Any = Noise(template.state.model.shared)

    def bring(index: int) -> object:
        return exchange.combine(noise, noise, run.sample_round(index), *recorder.brought)

    return bring


class Noise:
    """The part of an algorithm that a site uses when it combines."""

    def __init__(self, like: Tensor):
        self.parameters, self.delta = like, 1e-3 * torch.randn_like(like)

    def contribution(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def global_state(self) -> dict[str, Tensor]:
        return {"parameters": self.parameters}

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        """Leave it."""


class Recorder(InWorld):
    """Keeps what a silo brings to a combination, and combines nothing."""

    brought: tuple[Scalars, Mapping[str, Tensor]]

    def __init__(self, topology: Topology, *others: Any):
        super().__init__(topology.alone(), *others)

    def combine(
        self,
        algorithm: RunSession,
        session: RoundSession,
        round: Round,
        scalars: Scalars,
        tables: Mapping[str, Tensor],
    ) -> Combined:
        self.brought = dict(scalars), {name: table.clone() for name, table in tables.items()}
        return Combined(scalars, dict(tables), None, perf_counter())


ROLES = {role.__name__: role for role in (coordinator, site, rank, receiver, sender, noise)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ROLES[sys.argv[1]](Pipe(), json.loads(sys.argv[2]))
