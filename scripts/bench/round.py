"""Measure the cost of federated rounds, without evaluation.

    python -m scripts.bench.round

FedAvg trains the 2NN of McMahan et al. 2017 with clients of 600 examples, batch size 10 and one epoch a round, on 2
silos of one rank with one thread each. It alternates with a hand-written version.

    round       2 clients, both in every round. By hand: the same steps in two processes without a wrapper, then one
                bare all_reduce of the parameters.
    simulation  100 clients, 10 of them in every round. By hand: one process trains one client after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.bench import ddp_baseline
from scripts.bench.paired_timing import Side, duel, in_workers, machine
from scripts.bench.step import images
from trainer.algorithms import FedAvg
from trainer.data import Clients, DataSplits, Iid, TensorSource
from trainer.data.client_sampling.sampling import AllClients, ClientSampler, UniformSampler
from trainer.distributed.topology import Topology, distributed
from trainer.loop.options import EvalOptions, TrainingOptions
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models import MLP
from trainer.tasks import Classification

CLIENT_EXAMPLES = 600
BATCH_SIZE = 10
ROUNDS = 10  # in one timed call
COHORT_SIZE = 10  # of the simulation
SIMULATION_GOAL = 0.58

Examples = tuple[Tensor, Tensor]

sgd = partial(torch.optim.SGD, lr=0.05)


def ours(topology: Topology, source: TensorSource, clients: Clients, cohort: ClientSampler) -> Side:
    """Train rounds of the trainer, without evaluation."""
    run = Run(
        topology=topology,
        model=MLP,
        task=Classification(),
        data=DataSplits(source, source, 10),
        clients=clients,
        algorithm=FedAvg(),
        optimizer=sgd,
        rounds=10**6,
        training=TrainingOptions(batch_size=BATCH_SIZE),
        client_sampling=cohort,
        eval=EvalOptions(every_rounds=10**6),
    )
    state = TrainState(run)

    def side(pair: int) -> None:
        for index in range(pair * ROUNDS, (pair + 1) * ROUNDS):
            train_round(state, run.sample_round(index))

    return side


def bare_steps(rank: int, source: TensorSource) -> Side:
    """Take the same local steps without a wrapper, then all_reduce one flat vector."""
    inputs, targets = source.fetch(torch.arange(rank * CLIENT_EXAMPLES, (rank + 1) * CLIENT_EXAMPLES))
    model = MLP()
    optimizer = sgd(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def side(pair: int) -> None:
        for index in range(ROUNDS):
            generator = torch.Generator().manual_seed(pair * ROUNDS + index)
            order = torch.randperm(CLIENT_EXAMPLES, generator=generator)
            ddp_baseline.steps(model, optimizer, F.cross_entropy, inputs, targets, order.split(BATCH_SIZE))
            dist.all_reduce(flat)

    return side


def one_process(source: TensorSource, clients: Clients, cohort: ClientSampler) -> Side:
    """Train all clients of a round in this process, one after the other."""
    examples = [source.fetch(torch.from_numpy(ids)) for ids in clients.train]
    model = MLP()

    def side(pair: int) -> None:
        for index in range(pair * ROUNDS, (pair + 1) * ROUNDS):
            plain_round(model, [examples[client] for client in cohort.sample(len(clients), 0, index)], index)

    return side


def plain_round(model: nn.Module, members: Sequence[Examples], seed: int) -> None:
    """Train these clients from the model, and set it to their mean, weighted by examples."""
    generator = torch.Generator().manual_seed(seed)
    start = deepcopy(model.state_dict())
    mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    examples = sum(len(targets) for _, targets in members)
    for inputs, targets in members:
        model.load_state_dict(start)
        optimizer = sgd(model.parameters())
        order = torch.randperm(len(targets), generator=generator)
        ddp_baseline.steps(model, optimizer, F.cross_entropy, inputs, targets, order.split(BATCH_SIZE))
        for name, tensor in model.state_dict().items():
            mean[name] += tensor * (len(targets) / examples)
    model.load_state_dict(mean)


def compare_round(topology: Topology, pairs: int) -> None:
    """Print the rates of both sides in steps per second."""
    source = TensorSource(*images(28).fetch(torch.arange(CLIENT_EXAMPLES * topology.world_size)))
    clients = Iid().split(source, source, clients=topology.world_size, seed=0)
    steps = ROUNDS * CLIENT_EXAMPLES // BATCH_SIZE
    trainer, by_hand = ours(topology, source, clients, AllClients()), bare_steps(topology.rank, source)
    duel("round", trainer, by_hand, pairs, "steps/s", steps)


def compare_simulation(topology: Topology, pairs: int) -> None:
    """Print the seconds of a round on both sides, and their ratio."""
    source, cohort = images(28), UniformSampler(COHORT_SIZE)
    clients = Iid().split(source, source, len(source) // CLIENT_EXAMPLES, seed=0)
    trainer = ours(topology, source, clients, cohort)
    # Meanwhile rank 1 sleeps at the next barrier; gloo does not spin.
    by_hand = idle if topology.rank else one_process(source, clients, cohort)
    times = seconds_in_turn(trainer, by_hand, pairs)
    if topology.rank == 0:
        ratios = sorted(our_seconds / their_seconds for our_seconds, their_seconds in times)
        our_round, their_round = (median(side) / ROUNDS for side in zip(*times, strict=True))
        spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}"
        print(
            f"simulation  ours {our_round:.3f} s/round   by hand {their_round:.3f} s/round   "
            f"ours / by hand {median(ratios):.3f}, middle half {spread}, {pairs} pairs; goal {SIMULATION_GOAL}",
            flush=True,
        )


def idle(pair: int) -> None:
    """Do nothing, and leave the work to the other rank."""


def seconds_in_turn(ours: Side, theirs: Side, pairs: int) -> list[tuple[float, float]]:
    """Return the seconds of both sides in each pair.

    The first pair is not counted, and the side that goes first alternates.
    """
    times = []
    for pair in range(pairs + 1):
        order = (ours, theirs) if pair % 2 else (theirs, ours)
        taken = {side: seconds_of(side, pair) for side in order}
        times.append((taken[ours], taken[theirs]))
    return times[1:]


def seconds_of(side: Side, pair: int) -> float:
    """Return the seconds from the common start until all ranks are done."""
    dist.barrier()
    began = time.perf_counter()
    side(pair)
    dist.barrier()
    return time.perf_counter() - began


CASES = {"round": compare_round, "simulation": compare_simulation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=7)
    choices = parser.parse_args()
    if not in_workers("scripts.bench.round"):
        return
    with distributed(silos=2, device="cpu") as topology:
        if topology.rank == 0:
            print(machine())
        for name in choices.cases:
            CASES[name](topology, choices.pairs)


if __name__ == "__main__":
    main()
