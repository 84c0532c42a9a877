"""Measure the share of time in which two hosts train, if they share a link.

    python -m scripts.bench.comm.rounds --rate 100mbit

A GPT of 10 million parameters trains on Shakespeare, on two hosts of one thread each. Utilisation is the time of the
same steps without communication, divided by the time of the rounds; both are medians. There are two versions of it:

    by bare steps  some steps without communication are timed before each round
    inside         the steps of the round itself on the slowest host, less the CPU time of the communication threads;
                   this does not depend on how fast the machine is from minute to minute

`sync` is one silo over both hosts, with `--sync-steps` steps; the others are two silos with rounds of `--steps` steps.
The table also has, for each round, the seconds in which training waited for communication, and the bytes that have left
the interfaces, divided by the bytes that the trainer reports.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from scripts.bench.comm.link import in_workers_on_hosts, sent_through_link
from scripts.bench.paired_timing import machine
from trainer.algorithms import Algorithm, FedAvg, Streaming, Sync
from trainer.data import Iid, shakespeare
from trainer.distributed.compression import Int8, Uncompressed, UpdateCompression
from trainer.distributed.gradients import FullPrecisionReducer
from trainer.distributed.gradients import Int8Reducer as Int8Gradients
from trainer.distributed.topology import Topology, distributed
from trainer.loop.options import ClipOptions, EvalOptions, RoundOptions, TrainingOptions
from trainer.loop.round import train_round
from trainer.loop.run import GradientReducerFactory, Run
from trainer.loop.train_state import TrainState
from trainer.models import GPT
from trainer.tasks import LanguageModelling

LENGTH = 128  # tokens in a window
SEQUENCES = 10  # of one host in a step
BARE_STEPS = 15  # before each round, because the speed of the machine varies

adamw = partial(torch.optim.AdamW, lr=1e-3)
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Case:
    """An algorithm, its number of silos, and the number of its rounds that equal one round of the other algorithms."""

    algorithm: Callable[[], Algorithm]
    silos: int = 2
    parts: int = 1


CASES = {
    "sync": Case(Sync, silos=1),
    "fedavg": Case(FedAvg),
    "diloco": Case(partial(FedAvg, server=nesterov, weighting="equal", client_optimizer_state="keep")),
    "delayed": Case(partial(Streaming, overlap_steps=8)),
    "streaming": Case(partial(Streaming, server=nesterov, fragments=2, overlap_steps=8, alpha=0.5), parts=2),
}
UPLINKS: dict[str, tuple[UpdateCompression, GradientReducerFactory]] = {
    "fp32": (Uncompressed(), FullPrecisionReducer),
    "int8": (Int8(), Int8Gradients),
}


def make_run(topology: Topology, case: Case, uplink: str, steps: int) -> Run:
    """Return a run with the same work for a host in each step, whatever the algorithm."""
    data = shakespeare(length=LENGTH)
    between, inside = UPLINKS[uplink]
    return Run(
        topology=topology,
        model=partial(GPT, length=LENGTH, layers=8, heads=8, width=320),
        task=LanguageModelling(),
        data=data,
        clients=Iid().split(data.train, data.test, clients=2, seed=0),
        algorithm=case.algorithm(),
        optimizer=adamw,
        rounds=10**6,
        training=TrainingOptions(batch_size=SEQUENCES * topology.num_replicas, clip=ClipOptions(1.0)),
        round=RoundOptions(steps=steps),
        update_compression=Uncompressed() if case.silos == 1 else between,
        gradient_compression=inside,
        eval=EvalOptions(every_rounds=10**6),
    )


class BareSteps:
    """Steps without communication, on all hosts at once."""

    def __init__(self, topology: Topology):
        self.run = make_run(topology, CASES["fedavg"], "fp32", BARE_STEPS)
        state = TrainState(self.run)
        self.trainer, self.client, self.rounds = state.trainer, topology.silo, 0
        self.session = state.algorithm.start_round(self.run.sample_round(0))
        self.seconds()  # the first ones are slow

    def seconds(self) -> float:
        """Return the seconds of a step on the slowest host."""
        client, slowest = self.trainer.start_client(self.session, self.client), torch.zeros(1)
        dist.barrier()
        began = time.perf_counter()
        self.trainer.train(client, self.run.sample_round(self.rounds), self.rounds, None, lambda client, wish: False)
        slowest[0] = (time.perf_counter() - began) / BARE_STEPS
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        self.rounds += 1
        return float(slowest)


@dataclass(frozen=True)
class Taken:
    """The seconds of some rounds: their duration, the steps of the slowest host, and the waiting of this host.

    The CPU time of the communication threads is subtracted from that of the steps.
    """

    clock: float
    steps: float
    waited: float

    @property
    def utilisation(self) -> float:
        """The share of the time in which the slowest host takes steps."""
        return self.steps / self.clock


def rounds_of(state: TrainState, indices: Iterator[int], count: int) -> Taken:
    """Run this number of rounds, and return their seconds."""
    clocks = (time.perf_counter, time.process_time, time.thread_time, lambda: state.transport.wait_seconds)
    began, steps = [clock() for clock in clocks], 0.0
    for index in itertools.islice(indices, count):
        figures = train_round(state, state.run.sample_round(index))
        assert figures
        steps += figures["seconds/compute"] + figures["seconds/data"]
    dist.barrier()
    clock, process, thread, waited = (clock() - then for clock, then in zip(clocks, began, strict=True))
    if state.run.algorithm.overlap_steps:
        steps -= waited  # totals are received between steps
    slowest = torch.tensor([steps - (process - thread)])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Taken(clock, float(slowest), waited)


def bench(name: str, uplink: str, steps: int, rounds: int, bare: BareSteps) -> str:
    """Return a row of the table."""
    case, of_step, taken = CASES[name], [], []
    with distributed(silos=case.silos, device="cpu") as topology:
        state = TrainState(make_run(topology, case, uplink, -(-steps // case.parts)))
        indices, before = itertools.count(), sent_through_link()
        rounds_of(state, indices, 1)  # the first round is slow
        for _ in range(rounds):
            of_step.append(bare.seconds())
            if state.run.algorithm.overlap_steps:
                rounds_of(state, indices, 1)  # receives the sums that were under way during the bare steps
            taken.append(rounds_of(state, indices, case.parts))
        state.algorithm.flush()
        through, sent = sent_through_link() - before, state.transport.bytes_sent
    seconds, waited, inside = (median(getattr(t, key) for t in taken) for key in ("clock", "waited", "utilisation"))
    used = f"{steps * median(of_step) / seconds:.3f} | {inside if case.silos > 1 else math.nan:.3f}"
    amount = f"{through / 1e6 * case.parts / next(indices):.2f} MB | {f'{through / sent:.3f}' if sent else '-'}"
    return f"| {name} | {uplink} | {steps} | {seconds:.2f} s | {used} | {waited:.2f} s | {amount} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", required=True, help="the rate of each host's link, for tc(8): 100mbit")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--uplinks", nargs="+", choices=UPLINKS, default=["fp32", "int8"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sync-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    choices = parser.parse_args()
    if not in_workers_on_hosts("scripts.bench.comm.rounds", choices.rate):
        return
    with distributed(silos=2, device="cpu") as topology:
        bare = BareSteps(topology)
        if topology.rank == 0:
            print(machine(), choices.rate, f"{choices.rounds} rounds", sep="; ")
            print("| algorithm | bytes | steps | round | by bare steps | inside | stood still | sent | link / metric |")
        for name in choices.cases:
            for uplink in choices.uplinks:
                steps = choices.sync_steps if name == "sync" else choices.steps
                row = bench(name, uplink, steps, choices.rounds, bare)
                if topology.rank == 0:
                    print(row, flush=True)


if __name__ == "__main__":
    main()
