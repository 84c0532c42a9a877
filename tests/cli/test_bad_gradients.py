"""What `gradients=` cannot be is refused: key, value, what is valid."""

from __future__ import annotations

import pytest

from tests.cli.refusals import assert_says, building, composing
from trainer.distributed.topology import Topology, distributed


@pytest.fixture(scope="module")
def topology():
    with distributed(device="cpu") as topology:
        yield topology


BAD = {
    "half a block": (["gradients=int8", "gradients.block=12"], ["gradients.block=12", "a multiple of 8, from 8"]),
    "no block": (["gradients=int8", "gradients.block=0"], ["gradients.block=0", "a multiple of 8, from 8"]),
    "a block of words": (["gradients=int8", "gradients.block=x"], ["gradients.block=x", "a whole number"]),
    "no columns": (["gradients=powersgd", "gradients.rank=0"], ["gradients.rank=0", "a whole number from 1"]),
    "too early": (["gradients=powersgd", "gradients.start=1"], ["gradients.start=1", "a whole number from 2"]),
    "both": (
        ["gradients=powersgd", "gradients.rank=-1", "gradients.start=0"],
        ["gradients.rank=-1", "gradients.start=0"],
    ),
    "another type": (["gradients=bf16", "gradients.dtype=float8"], ["gradients.dtype=float8", "bfloat16 or float16"]),
    "another's key": (["gradients=int8", "+gradients.rank=2"], ["gradients.rank", "no argument", "gradients.block"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(topology: Topology, name: str):
    overrides, parts = BAD[name]
    assert_says(building(overrides, topology), parts)


def test_an_unknown_choice_is_answered_by_those_there_are():
    assert_says(composing(["gradients=int9"]), ["gradients=int9", "did you mean int8?", "fp32", "powersgd"])
