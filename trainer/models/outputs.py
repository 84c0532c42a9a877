"""The output of a model that returns several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class SelectOutput:
    """A forward hook that replaces a model's outputs by one of them. Names of parameters stay as they are.

    Attributes:
        key: the name of the output in a mapping or among the attributes, or its index in a tuple or list; of outputs
            inside outputs all of them, with dots: `decoder.0`.
    """

    key: str | int

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        found = outputs
        for key in str(self.key).split("."):
            named = {str(name): output for name, output in named_outputs(found).items()}
            if key not in named:
                raise ValueError(f"task.output={self.key}, but the model gives {describe_outputs(found)}")
            found = named[key]
        return found


def named_outputs(outputs: Any) -> dict[str | int, Any]:
    """Return the outputs that a model gives together by their names, or else by their indices; empty for a tensor."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if hasattr(outputs, "_fields"):  # a named tuple
        return {**outputs._asdict(), **dict(enumerate(outputs))}
    if isinstance(outputs, Sequence):
        return dict(enumerate(outputs))
    return {} if isinstance(outputs, Tensor) else dict(getattr(outputs, "__dict__", {}))


def describe_outputs(outputs: Any) -> str:
    """Describe the outputs of a model for a message, such as "a dict with logits, loss"."""
    if outputs is None:
        return "None"
    names = ", ".join(map(str, named_outputs(outputs)))
    return f"a {type(outputs).__name__}{' with ' * bool(names)}{names}"
