"""Choices that ranks with parts of a model cannot make are refused, with the reason and the way out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.support.runs import make_run
from trainer.distributed.gradients import HalfPrecisionReducer, Int8Reducer, PowerSGDReducer
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.topology import Topology, distributed
from trainer.optim import Muon

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({"optimizer": partial(Muon, lr=0.01)}, "optimizer=Muon with silo.shard=2: its step depends on whole"),
    "fp16": ({"autocast": torch.float16}, "precision=fp16 with silo.shard=2: a gradient that overflows on one rank"),
    "int8": (
        {"gradient_compression": Int8Reducer},
        "gradient_compression=Int8Reducer with silo.shard=2: it compresses",
    ),
    "powersgd": ({"gradient_compression": PowerSGDReducer}, "gradient_compression=PowerSGDReducer with silo.shard=2:"),
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
    "bf16": {"autocast": torch.bfloat16},
    "gradients in bf16": {"gradient_compression": HalfPrecisionReducer},
}


def in_parts(topology: Topology) -> Topology:
    """Return the topology of a rank in a silo of two, with half of the model."""
    return replace(topology, silo_sizes=(2,), dims=ParallelDims(shard=2))


@pytest.mark.parametrize(("choices", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_the_whole_model_is_refused(choices: dict[str, Any], message: str):
    with distributed(device="cpu") as topology:
        make_run(topology, [8], **choices)
        with pytest.raises(ValueError, match=message) as refusal:
            make_run(in_parts(topology), [8], **choices)
    assert str(refusal.value).endswith(", or silo.shard=1")


@pytest.mark.parametrize("choices", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_works_by_part_is_accepted(choices: dict[str, Any]):
    with distributed(device="cpu") as topology:
        make_run(in_parts(topology), [8], **choices)


def test_divided_layers_are_not_compiled():
    with distributed(device="cpu") as topology:
        divided = replace(topology, silo_sizes=(2,), dims=ParallelDims(tensor=2))
        with pytest.raises(ValueError, match=r"compile_backend=inductor with silo\.tensor=2: torch does not compile"):
            make_run(divided, [8], compile_backend="inductor")


def test_all_errors_are_raised_at_once():
    with distributed(device="cpu") as topology, pytest.raises(ValueError, match=r"optimizer=Muon[\s\S]+precision=fp16"):
        make_run(in_parts(topology), [8], optimizer=partial(Muon, lr=0.01), autocast=torch.float16)


def test_an_older_torch_cannot_try_micro_batches(monkeypatch: pytest.MonkeyPatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    with distributed(device="cpu") as topology, pytest.raises(ValueError, match=r"micro_batch_size=auto with silo\.s"):
        make_run(in_parts(topology), [8], micro_batch_size="auto")
