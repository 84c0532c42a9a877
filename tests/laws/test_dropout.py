"""Random draws in training never repeat within a run, and are the same in the same run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.laws.cases import case_run, silos_of
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions


class Masks(nn.Module):
    """A linear model that keeps the mask of dropout over 64 ones at each forward pass in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3, dtype=torch.float64)
        self.drawn: list[tuple[float, ...]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(tuple(nn.functional.dropout(torch.ones(64)).tolist()))
        return self.linear(inputs)


def masks_of(name: str, silos: SiloSpec, choices: dict[str, Any]) -> list[tuple[float, ...]]:
    with distributed(silos_of(name, silos)) as topology:
        model = fit(case_run(topology, name, {"module": Masks(), "rounds": 2} | choices)).model
        assert isinstance(model, Masks)
        return model.drawn


CHOICES: dict[str, Any] = {"sizes": [8, 8, 8], "batch_size": 8, "micro_batch_size": 2, "round": RoundOptions(steps=2)}


def test_every_forward_pass_draws_anew(ranks):
    """Masks of 64 bits differ between replicas, clients, rounds, steps, micro-batches and seeds.

    2 ranks have 4 examples each of a batch of 8, hence 2 micro-batches; 3 clients and 2 rounds of 2 steps.
    """
    drawn = [masks for seed in (0, 1) for masks in ranks(2).run(masks_of, "fedavg", 1, CHOICES | {"seed": seed})]
    assert [len(masks) for masks in drawn] == [2 * 3 * 2 * 2] * 4
    together = [mask for masks in drawn for mask in masks]
    assert len(set(together)) == len(together)


def test_a_run_draws_what_it_drew(ranks):
    """Earlier draws do not matter: a global random state is not part of a run."""
    first = ranks(2).run(masks_of, "fedavg", 1, CHOICES)
    ranks(2).run(partial(torch.rand, 5))
    assert ranks(2).run(masks_of, "fedavg", 1, CHOICES) == first


def test_a_clients_masks_do_not_depend_on_its_silo(ranks):
    """Three clients on one silo and on two have the same masks."""
    one = ranks(1).run(masks_of, "fedavg", 1, CHOICES)[0]
    two = ranks(2).run(masks_of, "fedavg", 2, CHOICES)
    assert sorted(one) == sorted(mask for masks in two for mask in masks)
