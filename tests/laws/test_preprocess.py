"""Transforms depend on examples, not on ranks: an example is transformed alike on any rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.runs import make_data, make_run, parameters
from trainer.algorithms import FedAvg, Sync
from trainer.data.transforms import Compose, CutOut, MixUp, RandomCrop, RandomFlip, Standardise
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.options import RoundOptions
from trainer.loop.round import train_round
from trainer.loop.train_state import TrainState

SIZES = [20, 14, 6]


def chain() -> Compose:
    return Compose(
        {
            "standardise": Standardise(),
            "crop": RandomCrop(3),
            "flip": RandomFlip(),
            "cutout": CutOut(8),
            "mixup": MixUp(),
        },
        classes=10,
    )


def trained(silos: SiloSpec) -> list[torch.Tensor]:
    """Return the parameters after three epochs; the third rank's shard of the last batch is empty."""
    with distributed(silos, device="cpu") as topology:
        run = make_run(topology, SIZES, algorithm=Sync(), rounds=1, round=RoundOptions(epochs=3), transforms=chain())
        state = TrainState(run)
        train_round(state, run.sample_round(0))
        return parameters(state.model.module)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_sees_what_one_sees(ranks, size: int):
    (alone,) = ranks(1).run(trained, 1)
    for together in ranks(size).run(trained, 1):
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def statistics(silos: SiloSpec) -> tuple[torch.Tensor, torch.Tensor]:
    with distributed(silos, device="cpu") as topology:
        run = make_run(topology, SIZES, algorithm=FedAvg(), transforms=chain())
        standardise = TrainState(run).trainer.transforms.transforms["standardise"]
        assert isinstance(standardise, Standardise)
        return standardise.mean, standardise.std


@pytest.mark.parametrize("silos", [1, 3, [2, 1], [1, 1]], ids=str)
def test_silos_standardise_by_the_pooled_statistics(ranks, silos: SiloSpec):
    """To 1e-6 of numpy's over all training examples, which no rank has."""
    size = silos if isinstance(silos, int) else sum(silos)
    columns = make_data("mlp", sum(SIZES)).train.fetch(torch.arange(sum(SIZES)))[0].double().numpy()
    for mean, std in ranks(size).run(statistics, silos):
        np.testing.assert_allclose(mean, [columns.mean()], rtol=1e-6)
        np.testing.assert_allclose(std, [columns.std()], rtol=1e-6)
