"""How much of the time two hosts train that share a link: python -m scripts.bench_comm.rounds --rate 100mbit

A gpt of 10 million parameters on Shakespeare, two hosts of one thread each. Utilisation is the time of the same steps
with nothing sent, over the time of whole rounds. `sync` is one silo over both hosts, of `--sync-steps` steps, the
others are two silos with rounds of `--steps`. Told beside it, of each round: the seconds that training stood still for
what was under way between the silos, and what has left the hosts' interfaces over what the trainer says was sent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from scripts.bench_comm.link import in_workers_on_hosts, sent_through_link
from scripts.duel import machine
from trainer.algorithms import Algorithm, FedAvg, Streaming, Sync
from trainer.codecs import Full, Int8, Uplink
from trainer.data import Iid, shakespeare
from trainer.gradients import FullPrecision, Gradients
from trainer.gradients import Int8 as Int8Gradients
from trainer.models import GPT
from trainer.round import train_round
from trainer.run import RoundLength, Run
from trainer.state import State
from trainer.tasks import LanguageModelling
from trainer.topology import Topology, distributed

LENGTH = 128  # tokens of a window
SEQUENCES = 10  # of a host in a step

adamw = partial(torch.optim.AdamW, lr=1e-3)
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Case:
    """An algorithm, in how many silos, and how many rounds of it do what one of the others does."""

    algorithm: Callable[[], Algorithm]
    silos: int = 2
    parts: int = 1


CASES = {
    "sync": Case(Sync, silos=1),
    "fedavg": Case(FedAvg),
    "diloco": Case(partial(FedAvg, nesterov, weight="equal", inner_state="keep")),
    "delayed": Case(partial(Streaming, overlap_steps=8)),
    "streaming": Case(partial(Streaming, nesterov, fragments=2, overlap_steps=8, alpha=0.5), parts=2),
}
UPLINKS: dict[str, tuple[Uplink, Gradients]] = {"fp32": (Full(), FullPrecision()), "int8": (Int8(), Int8Gradients())}


def make_run(topology: Topology, case: Case, uplink: str, steps: int) -> Run:
    """The same work for a host in a step, whatever the algorithm."""
    data = shakespeare(length=LENGTH)
    between, inside = UPLINKS[uplink]
    torch.manual_seed(0)
    return Run(
        topology=topology,
        module=GPT(length=LENGTH, layers=8, heads=8, width=320),
        task=LanguageModelling(),
        data=data,
        clients=Iid().split(data.train, data.test, clients=2, seed=0),
        algorithm=case.algorithm(),
        optimizer=adamw,
        rounds=10**6,
        batch_size=SEQUENCES * topology.num_replicas,
        length=RoundLength(steps=steps),
        uplink=Full() if case.silos == 1 else between,
        gradients=inside,
        clip_norm=1.0,
        evaluate_every=10**6,
    )


def seconds_of_step(topology: Topology, steps: int) -> float:
    """Of each of so many steps with nothing sent, on all hosts at once; the slowest host's."""
    run = make_run(topology, CASES["fedavg"], "fp32", steps)
    trainer, client = State(run).trainer, topology.silo
    slowest = torch.zeros(1)
    for index in range(2):  # the first one warms up
        work = trainer.begin(client)
        dist.barrier()
        began = time.perf_counter()
        trainer.train(work, run.round(index), index, None, lambda work, wish: False)
        slowest[0] = time.perf_counter() - began
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest) / steps


def bench(outer: Topology, name: str, uplink: str, steps: int, rounds: int, of_step: float) -> None:
    """Prints a row of the table."""
    case = CASES[name]
    with distributed(silos=case.silos, device="cpu") as topology:
        state = State(make_run(topology, case, uplink, -(-steps // case.parts)))
        before, began = sent_through_link(), time.perf_counter()
        for index in range(rounds * case.parts):
            train_round(state, state.run.round(index))
        state.run.algorithm.settle()
        dist.barrier()
        taken = (time.perf_counter() - began) / rounds
        through = sent_through_link() - before
        told = f"{through / state.wire.bytes_sent:.3f}" if state.wire.bytes_sent else "-"
    if outer.rank == 0:
        utilisation = steps * of_step / taken
        waited = state.wire.seconds_waited / rounds
        figures = f"{taken:.2f} s | {utilisation:.3f} | {waited:.2f} s | {through / 1e6 / rounds:.2f} MB"
        print(f"| {name} | {uplink} | {steps} | {figures} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", required=True, help="of the link of each host, for tc(8): 100mbit")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--uplinks", nargs="+", choices=UPLINKS, default=["fp32", "int8"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sync-steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    choices = parser.parse_args()
    if not in_workers_on_hosts("scripts.bench_comm.rounds", choices.rate):
        return
    with distributed(silos=2, device="cpu") as topology:
        of_step = seconds_of_step(topology, 5)
        if topology.rank == 0:
            print(machine(), choices.rate, f"{choices.rounds} rounds", f"{of_step:.3f} s a step", sep="; ")
            print("| algorithm | bytes | steps | a round | utilisation | stood still | sent | interfaces / told |")
        for name in choices.cases:
            for uplink in choices.uplinks:
                steps = choices.sync_steps if name == "sync" else choices.steps
                bench(topology, name, uplink, steps, choices.rounds, of_step)


if __name__ == "__main__":
    main()
