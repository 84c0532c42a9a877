"""How a model is called with a batch of inputs: the one place where a model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trainer.utils.tensor_trees import Tree


def call_model(model: Callable[..., Any], inputs: Tree) -> Any:
    """Return `model(inputs)` for a tensor, `model(**inputs)` for a dict, and `model(*inputs)` for a tuple or a list."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
