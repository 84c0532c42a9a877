"""Options that only affect how numbers are computed keep the numbers: compilation, and activation checkpointing."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import make_run, parameters
from trainer.algorithms import Algorithm, FedAvg, Sync
from trainer.distributed.options import SiloOptions
from trainer.distributed.sharding.recompute import recompute_activations
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.options import RoundOptions
from trainer.loop.round import train_round
from trainer.loop.train_state import TrainState
from trainer.models import GPT

WORLDS = pytest.mark.parametrize(("silos", "algorithm"), [(1, Sync), (2, FedAvg)], ids=["sync", "fedavg"])
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


def trained(silos: SiloSpec, algorithm: type[Algorithm], choices: dict[str, Any]) -> tuple[list[torch.Tensor], Metrics]:
    """Return the parameters after two rounds, and the metrics of the second."""
    with distributed(silos, device="cpu") as topology:
        torch.manual_seed(0)
        run = make_run(topology, [20, 20], "gpt", algorithm(), rounds=2, round=RoundOptions(steps=3), **choices)
        state = TrainState(run)
        figures = [train_round(state, run.sample_round(index)) for index in range(2)]
        assert figures[1]
        return parameters(state.model.module), figures[1]


def gpt(**choices: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=64, length=16, layers=2, heads=2, width=32, **choices)


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@WORLDS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.quick_rows(1)
def test_a_compiled_model_learns_the_same(ranks, backend: str, silos: SiloSpec, algorithm: type[Algorithm]):
    """The last batch of an epoch is smaller: it may be compiled again, but the second round compiles nothing."""
    plain = ranks(2).run(trained, silos, algorithm, {})
    for (ours, figures), (theirs, _) in zip(
        ranks(2).run(trained, silos, algorithm, {"compile_backend": backend}), plain, strict=True
    ):
        assert_close(ours, theirs)
        assert figures["compile/graphs"] > 0
    assert "compile/graphs" not in plain[0][1]


@WORLDS
def test_activations_that_are_computed_again_are_the_same_bits(ranks, silos: SiloSpec, algorithm: type[Algorithm]):
    """With dropout too: the state of the generators is restored."""
    kept, again = (
        ranks(2).run(trained, silos, algorithm, {"module": gpt(dropout=0.1), "silo": SiloOptions(recompute=recompute)})
        for recompute in (False, True)
    )
    for (ours, _), (theirs, _) in zip(again, kept, strict=True):
        assert all(map(torch.equal, ours, theirs))


class Normalized(nn.Module):
    """Images through blocks with the statistics of batches, which are not to be counted twice."""

    def __init__(self):
        super().__init__()
        layers = (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3))
        self.blocks = nn.ModuleList(nn.Sequential(*map(deepcopy, layers)) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = block(images)
        return images


def test_statistics_of_batches_are_counted_once():
    """And gradients are the same bits."""
    torch.manual_seed(0)
    one, other = Normalized(), Normalized()
    other.load_state_dict(one.state_dict())
    recompute_activations(other.blocks)
    images = torch.rand(4, 3, 5, 5)
    for module in (one, other):
        for step in range(2):
            torch.manual_seed(step)
            module(images).square().sum().backward()
    for (name, ours), theirs in zip(other.state_dict().items(), one.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(other.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def peak(recompute: bool) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = gpt()
    if recompute:
        recompute_activations(model.blocks)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.zeros(8, 16, dtype=torch.int64))
    return sum(kept.values())


def test_activations_that_are_computed_again_are_not_kept():
    assert peak(recompute=True) < peak(recompute=False) / 2
