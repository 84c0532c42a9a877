"""A model never meets an empty batch: a replica without examples puts another's through, and it counts for nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.laws.cases import Records, assert_close, figures, leaves
from tests.support.runs import make_clients, make_run
from trainer.data import DataSplits, ExampleWeights
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit

TESTS = 2


class Flattening(nn.Module):
    """Flattens by `view(len(x), -1)`, which torch cannot do with an empty batch, and pools by `max`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 3, generator=generator, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        assert inputs.abs().max() > 0
        return inputs.view(inputs.size(0), -1) @ self.weight


class Images(Dataset[tuple[Tensor, int]]):
    """Images [3, 4] of three classes, an item at a time."""

    def __init__(self, examples: int) -> None:
        self.inputs = torch.randn(examples, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.inputs[index, :, 0].argmax())


def train_images(examples: int, choices: dict[str, Any]) -> tuple[dict[str, Any], list[Metrics]]:
    """Return the parameters and metrics of two epochs of batches of 8."""
    with distributed() as topology:
        records = Records()
        run = make_run(
            topology,
            [examples],
            module=Flattening(),
            data=DataSplits(Images(examples), Images(TESTS), 3),
            clients=make_clients([examples], TESTS),
            optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9),
            rounds=2,
            **choices,
        )
        return leaves(fit(run, [records]).model.state_dict()), records.rounds


WEIGHTS = torch.tensor([0.0, 1.0, 2.0] * 3)
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weights": ExampleWeights(WEIGHTS, (9.0,))},
    "micro-batches": {"micro_batch_size": 2},
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_without_examples_change_nothing(ranks, size: int, choices: str) -> None:
    """The second batch has one example, and the test set two."""
    ((parameters, rounds),) = ranks(1).run(train_images, 9, CHOICES[choices])
    for ours, our_rounds in ranks(size).run(train_images, 9, CHOICES[choices]):
        assert_close(ours, parameters)
        for our_round, their_round in zip(our_rounds, rounds, strict=True):
            assert figures(our_round) == pytest.approx(figures(their_round), rel=1e-9, nan_ok=True)
