"""What a federated round costs beside its local steps: python -m scripts.bench_round

FedAvg with the 2NN of McMahan et al. 2017: 2 clients of 600 examples on 2 silos of one rank, batch 10, one epoch a
round. By hand: the same steps in two processes that know nothing of each other, then one bare all_reduce of the
parameters. One thread each, in turn.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F

from scripts import handwritten
from scripts.bench_step import images
from scripts.duel import Side, duel, in_workers, machine
from trainer.algorithms import FedAvg
from trainer.data import Arrays, Iid, Splits
from trainer.models import MLP
from trainer.round import train_round
from trainer.run import Run
from trainer.state import State
from trainer.tasks import Classification
from trainer.topology import Topology, distributed

CLIENT_EXAMPLES = 600
BATCH_SIZE = 10
ROUNDS = 10  # of one timed call

sgd = partial(torch.optim.SGD, lr=0.05)


def ours(topology: Topology, source: Arrays) -> Side:
    """Rounds of the trainer, without evaluation."""
    run = Run(
        topology=topology,
        module=MLP(),
        task=Classification(),
        data=Splits(source, source, 10),
        clients=Iid().split(source, source, clients=topology.world_size, seed=0),
        algorithm=FedAvg(),
        optimizer=sgd,
        rounds=10**6,
        batch_size=BATCH_SIZE,
        evaluate_every=10**6,
    )
    state = State(run)

    def side(pair: int) -> None:
        for index in range(pair * ROUNDS, (pair + 1) * ROUNDS):
            train_round(state, run.round(index))

    return side


def by_hand(rank: int, source: Arrays) -> Side:
    """The same local steps without a wrapper, then one all_reduce of one flat vector."""
    inputs, targets = source.fetch(torch.arange(rank * CLIENT_EXAMPLES, (rank + 1) * CLIENT_EXAMPLES))
    model = MLP()
    optimizer = sgd(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def side(pair: int) -> None:
        for index in range(ROUNDS):
            generator = torch.Generator().manual_seed(pair * ROUNDS + index)
            order = torch.randperm(CLIENT_EXAMPLES, generator=generator)
            handwritten.steps(model, optimizer, F.cross_entropy, inputs, targets, order.split(BATCH_SIZE))
            dist.all_reduce(flat)

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    choices = parser.parse_args()
    if not in_workers("scripts.bench_round"):
        return
    with distributed(silos=2, device="cpu") as topology:
        if topology.rank == 0:
            print(machine())
        whole = images(28)
        source = Arrays(*whole.fetch(torch.arange(CLIENT_EXAMPLES * topology.world_size)))
        steps = ROUNDS * CLIENT_EXAMPLES // BATCH_SIZE
        duel("fedavg", ours(topology, source), by_hand(topology.rank, source), choices.pairs, "steps/s", steps)


if __name__ == "__main__":
    main()
