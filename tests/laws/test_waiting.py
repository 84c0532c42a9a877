"""No step waits for the device: nothing is copied from the device to the host while a client trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.runs import SGD, make_run
from trainer.data.transforms import Compose, CutOut, RandomCrop, RandomFlip, RandomRotation
from trainer.distributed.topology import Topology, distributed
from trainer.loop.options import ClipOptions
from trainer.loop.round import train_round
from trainer.loop.step import TrainStep
from trainer.loop.train_state import TrainState

# Operations that return a number to the host, or whose shape depends on values on the device.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}

PREPROCESS = Compose({"crop": RandomCrop(2), "flip": RandomFlip(), "turn": RandomRotation(), "cutout": CutOut(4)}, 10)
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"autocast": torch.bfloat16},
    "clipped": {"clip": ClipOptions(max_norm=1.0)},
    "clipped_bf16": {"clip": ClipOptions(max_norm=1.0), "autocast": torch.bfloat16},
    "clipped_by_largest": {"clip": ClipOptions(max_norm=1.0, norm_type=float("inf"))},
    "clipped_by_value": {"clip": ClipOptions(max_norm=1.0, max_value=0.1)},
    "momentum": {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    "fused_adamw": {"optimizer": partial(torch.optim.AdamW, lr=0.001, fused=True)},
    "accumulated": {"micro_batch_size": 3},
    "scheduled": {"schedule": lambda progress: 1 - progress},
}
cases = [*(("mlp", name) for name in CHOICES), *(("gpt", name) for name in ("plain", "clipped_bf16"))]


class Counting(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found.append(name)
        return func(*args, **kwargs or {})


def epoch_of_steps(topology: Topology, model: str, choices: dict[str, Any]) -> Callable[[], None]:
    """Train the only client for an epoch of 6 steps, the last one smaller, after an epoch that is not counted."""
    state = TrainState(make_run(topology, [42], model, rounds=2, **choices))
    train_round(state, state.run.sample_round(0))
    round = state.run.sample_round(1)
    client = state.trainer.start_client(state.algorithm.start_round(round), 0)

    def steps() -> None:
        assert state.trainer.train(client, round, 1, lambda done, examples, loss: None, lambda client, action: False)

    return steps


@pytest.mark.parametrize(("model", "name"), cases)
@pytest.mark.quick_rows(4)
def test_no_number_is_read_in_a_step(model: str, name: str) -> None:
    with distributed(device="cpu") as topology:
        steps = epoch_of_steps(topology, model, CHOICES[name])
        with Counting() as counting:
            steps()
    assert counting.found == []


def test_no_number_is_read_in_preprocessing() -> None:
    """Mixing is left out: it converts labels to probabilities with checks that only the CPU makes."""
    with distributed(device="cpu") as topology:
        steps = epoch_of_steps(topology, "cnn", {"transforms": PREPROCESS})
        with Counting() as counting:
            steps()
    assert counting.found == []


def test_a_number_that_is_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most training loops read the loss."""
    micro_batch = TrainStep._forward_backward

    def reading(*arguments: Any) -> torch.Tensor:
        loss = micro_batch(*arguments)
        loss.item()
        return loss

    with distributed(device="cpu") as topology:
        steps = epoch_of_steps(topology, "mlp", {"optimizer": SGD})
        monkeypatch.setattr(TrainStep, "_forward_backward", reading)
        with Counting() as counting:
            steps()
    assert counting.found == ["_local_scalar_dense"] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(("model", "name"), cases)
def test_a_gpu_is_not_waited_for(model: str, name: str, on_device: bool) -> None:
    """CUDA raises an error if the host waits."""
    with distributed() as topology:
        steps = epoch_of_steps(topology, model, CHOICES[name] | {"cache_on_gpu": on_device})
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
