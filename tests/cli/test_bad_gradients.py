"""Invalid values of `gradient_compression=` are refused with the key, the value and the valid ones."""

from __future__ import annotations

import pytest

from tests.cli.refusals import assert_says, building, composing
from trainer.distributed.topology import Topology, distributed


@pytest.fixture(scope="module")
def topology():
    with distributed(device="cpu") as topology:
        yield topology


BAD = {
    "half a block": (
        ["gradient_compression=int8", "gradient_compression.block=12"],
        ["gradient_compression.block=12", "a multiple of 8, from 8"],
    ),
    "no block": (
        ["gradient_compression=int8", "gradient_compression.block=0"],
        ["gradient_compression.block=0", "a multiple of 8, from 8"],
    ),
    "a block of words": (
        ["gradient_compression=int8", "gradient_compression.block=x"],
        ["gradient_compression.block=x", "a whole number"],
    ),
    "no columns": (
        ["gradient_compression=powersgd", "gradient_compression.rank=0"],
        ["gradient_compression.rank=0", "a whole number from 1"],
    ),
    "too early": (
        ["gradient_compression=powersgd", "gradient_compression.start=1"],
        ["gradient_compression.start=1", "a whole number from 2"],
    ),
    "both": (
        ["gradient_compression=powersgd", "gradient_compression.rank=-1", "gradient_compression.start=0"],
        ["gradient_compression.rank=-1", "gradient_compression.start=0"],
    ),
    "another type": (
        ["gradient_compression=bf16", "gradient_compression.dtype=float8"],
        ["gradient_compression.dtype=float8", "bfloat16 or float16"],
    ),
    "another's key": (
        ["gradient_compression=int8", "+gradient_compression.rank=2"],
        ["gradient_compression.rank", "no argument", "gradient_compression.block"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_values_are_refused(topology: Topology, name: str):
    overrides, parts = BAD[name]
    assert_says(building(overrides, topology), parts)


def test_an_unknown_choice_is_answered_by_the_known_ones():
    assert_says(
        composing(["gradient_compression=int9"]),
        ["gradient_compression=int9", "did you mean int8?", "fp32", "powersgd"],
    )
