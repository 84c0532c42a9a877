"""Measure the cost of a round besides its steps, compared with one bare all-reduce.

    python -m scripts.bench.comm.combination

Two silos of one rank and one thread each run on this machine, on the CPU unless --device is given. Ours is everything
between the last step of a round and the first step of the next: the contribution, the header, the vectors, the server,
and the model made ready for its next client. By hand it is one all_reduce of equally many float32 numbers. The memory
is the amount by which the peak of a combination exceeds the memory that is always held (parameters, gradients, the
global copy, the server's state), in copies of the parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from scripts.bench.paired_timing import in_workers, machine
from trainer.algorithms import Algorithm, FedAvg, ModelAveraging
from trainer.algorithms.round import Round
from trainer.commands.plan.memory import peak_growth
from trainer.data import DataSplits, Iid, TensorSource
from trainer.distributed.topology import Topology, distributed
from trainer.loop.exchange import ExchangeFactory, InWorld
from trainer.loop.options import EvalOptions, MetricsOptions, RoundOptions, TrainingOptions
from trainer.loop.round import aggregate_round
from trainer.loop.round_metrics import RoundAccumulator
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.tasks import Classification
from trainer.utils.timing import synchronized_time

WIDTH = 1000
average = partial(torch.optim.SGD, lr=1.0, fused=True)  # as in conf/server
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True, fused=True)

# The limit of each case, in bare all-reduces.
ALGORITHMS: dict[str, tuple[Callable[[], Algorithm], float]] = {
    "averaging": (ModelAveraging, 1.3),
    "fedavg": (partial(FedAvg, server=average), 1.8),
    "fedavg, nesterov server": (partial(FedAvg, server=nesterov), 2.4),
}


def layers(numbers: int) -> nn.Sequential:
    """Return linear layers of about this many parameters in all."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(max(numbers // WIDTH**2, 1))))


def one_step_rounds(topology: Topology, algorithm: Algorithm, numbers: int, rounds: int, clients: int = 2) -> Run:
    """Return a run of rounds of one step, with a client in each of the first silos."""
    source = TensorSource(torch.randn(clients, WIDTH), torch.arange(clients))
    return Run(
        topology=topology,
        model=partial(layers, numbers),
        task=Classification(),
        data=DataSplits(source, source, WIDTH),
        clients=replace(Iid().split(source, source, clients, seed=0), homes=tuple(range(clients))),
        algorithm=algorithm,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        rounds=rounds,
        training=TrainingOptions(batch_size=1),
        round=RoundOptions(steps=1),
        eval=EvalOptions(every_rounds=10**6),
        metrics=MetricsOptions(per_client="none"),
    )


class Rounds:
    """Rounds of one step for one client a silo; everything but the step is timed."""

    def __init__(self, run: Run, make_exchange: ExchangeFactory = InWorld):
        self.run = run
        self.state = TrainState(run, make_exchange=make_exchange)
        self._begin(run.sample_round(0))

    def train(self) -> None:
        """Take the steps of the round."""
        self.state.trainer.train(self.client, self.round, self.round.index, None, lambda client, wish: False)

    def combine(self) -> None:
        """Do everything that is not a step, up to the first step of the next round."""
        tally, result = RoundAccumulator(self.run, self.round, self.state.model.statistics), self.client.result
        norm, kept = self.client.session.finish(result)
        self.state.trainer.commit(result.client, kept)
        tally.add(result, norm)
        aggregate_round(self.state, self.round, RoundSnapshot(self.session, tally))
        self._begin(self.run.sample_round(self.round.index + 1))

    def _begin(self, round: Round) -> None:
        self.round = round
        self.session = self.state.algorithm.start_round(round)
        self.client = self.state.trainer.start_client(self.session, self.run.topology.silo, exclusive=True)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from the common start until both ranks and their devices are done."""
    dist.all_reduce(torch.zeros(1))
    began = synchronized_time(device)
    action()
    synchronized_time(device)
    dist.all_reduce(torch.zeros(1))
    return synchronized_time(device) - began


def bench(topology: Topology, name: str, numbers: int, pairs: int) -> None:
    """Print a row of the table."""
    make, goal = ALGORITHMS[name]
    rounds = Rounds(one_step_rounds(topology, make(), numbers, pairs + 3))
    device = topology.device
    vector = torch.zeros(sum(parameter.numel() for parameter in rounds.state.model.module.parameters()), device=device)
    times: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        rounds.train()
        times.append((seconds_of(rounds.combine, device), seconds_of(lambda: dist.all_reduce(vector), device)))
    rounds.train()
    copies = peak_growth(device, rounds.combine) / vector.nbytes
    ratios = sorted(ours / bare for ours, bare in times[1:])
    ours, bare = (1e3 * median(side) for side in zip(*times[1:], strict=True))
    spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}"
    if topology.rank == 0:
        figures = f"{ours:.1f} ms | {bare:.1f} ms | {median(ratios):.2f} ({spread}) | {goal}"
        print(f"| {name} | {len(vector):,} | {figures} | {copies:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--numbers", nargs="+", type=int, default=[10_000_000, 100_000_000])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    choices = parser.parse_args()
    if not in_workers("scripts.bench.comm.combination"):
        return
    backend = "gloo" if torch.cuda.device_count() == 1 else "auto"  # gloo lets both ranks share the only GPU
    with distributed(silos=2, device=choices.device, backend=backend) as topology:
        if topology.rank == 0:
            print(machine(), f"{choices.pairs} pairs", sep="; ")
            print("| algorithm | parameters | ours | bare all_reduce | ratio (middle half) | goal | extra copies |")
        for numbers in choices.numbers:
            for name in choices.algorithms:
                bench(topology, name, numbers, choices.pairs)


if __name__ == "__main__":
    main()
