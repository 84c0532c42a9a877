"""Models are called as Hugging Face's are, and one of several outputs is found."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from trainer.models.calling import call_model
from trainer.models.outputs import SelectOutput


def given(*arguments: Any, **named: Any) -> tuple[Any, ...]:
    return arguments, named


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    ("inputs", "arguments", "named"),
    [
        (torch.ones(2), 1, []),
        ((1, 2), 2, []),
        ([1, 2, 3], 3, []),
        (Pair(1, 2), 2, []),
        ({"tokens": 1, "mask": 2}, 0, ["tokens", "mask"]),
        (({"tokens": 1},), 1, []),
    ],
)
def test_a_tensor_is_an_argument_and_a_tree_several(inputs: Any, arguments: int, named: list[str]) -> None:
    positional, keywords = call_model(given, inputs)
    assert len(positional) == arguments and list(keywords) == named


OUTPUTS = {"logits": torch.zeros(1), "decoder": (torch.ones(2), {"last": torch.ones(3)})}


@pytest.mark.parametrize(("key", "numbers"), [("logits", 1), ("decoder.0", 2), ("decoder.1.last", 3)])
def test_an_output_inside_outputs_is_named_with_dots(key: str, numbers: int) -> None:
    assert len(SelectOutput(key)(nn.Identity(), (), OUTPUTS)) == numbers


def test_an_output_that_is_missing_is_refused_where_it_is_missing() -> None:
    with pytest.raises(ValueError, match=r"task.output=decoder.1.first, but the model gives a dict with last"):
        SelectOutput("decoder.1.first")(nn.Identity(), (), OUTPUTS)
