"""Images in channels-last layout: the run is the same to rounding, and the layout is not saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.runs import make_clients, make_run
from trainer.data import DataSplits, TensorSource
from trainer.data.transforms import Compose, RandomCrop
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import Metrics
from trainer.loop.evaluate import evaluate
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models import ResNet

EXAMPLES = 24


def resnet_run(topology: Topology, channels_last: bool, **choices: Any) -> Run:
    """Return a run in float64, so that tolerances can be sharp."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(EXAMPLES, 3, 8, 8, generator=draw, dtype=torch.float64)
    source = TensorSource(images, torch.randint(0, 10, (EXAMPLES,), generator=draw))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = ResNet(depth=8, width=8, norm="batch").double()
    defaults: dict[str, Any] = {
        "module": module,
        "data": DataSplits(source, source, 10),
        "clients": make_clients([EXAMPLES], EXAMPLES),
        "transforms": Compose({"crop": RandomCrop(1)}, 10, channels_last),
        "rounds": 2,
    }
    return make_run(topology, [EXAMPLES], **(defaults | choices))


def one_round(state: TrainState, index: int) -> Metrics:
    metrics = train_round(state, state.run.sample_round(index))
    assert metrics is not None
    return metrics | (evaluate(state) or {})


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_run_is_the_same_to_rounding_and_may_go_on_in_either_layout() -> None:
    """Two rounds in each of the four combinations; the second is resumed from the first."""
    with distributed(device="cpu") as topology:
        ends: list[tuple[dict[str, Tensor], float]] = []
        for first in (False, True):
            begun = TrainState(resnet_run(topology, first))
            one_round(begun, 0)
            for second in (False, True):
                state = TrainState(resnet_run(topology, second))
                state.model.load_shared_state(begun.model.shared_state())
                state.trainer.statistics.take_from_model()
                metrics = one_round(state, 1)
                ends.append((state.model.shared_state(), metrics["test/loss"]))
    for model, loss in ends[1:]:
        assert_alike(model, ends[0][0])
        assert loss == pytest.approx(ends[0][1], rel=1e-9)


def test_the_model_sees_pixels_in_training_and_in_evaluation_and_keeps_its_own_layout() -> None:
    """All layers get channels-last inputs.

    The layout of the parameters, and so of saved and sent data, is unchanged.
    """
    seen: list[tuple[bool, bool, bool]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        laid_out = [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (*inputs, outputs)]
        seen.append((module.training, *laid_out))  # pyright: ignore[reportArgumentType]

    with distributed(device="cpu") as topology:
        state = TrainState(resnet_run(topology, True))
        for layer in (state.model.module.first, state.model.module.stage3[0].conv2):  # pyright: ignore
            layer.register_forward_hook(look)
        one_round(state, 0)
        assert set(seen) == {(True, True, True), (False, True, True)}
        assert all(parameter.is_contiguous() for parameter in state.model.trainable)


def test_what_are_no_images_are_refused() -> None:
    (fault,) = Compose({}, channels_last=True).errors(torch.ones(1, 5), torch.ones(1))
    assert "channels_last=true" in fault and "[5]" in fault and "set channels_last=false" in fault
    assert Compose({}, channels_last=True).errors(torch.ones(1, 3, 4, 4), torch.ones(1)) == []
