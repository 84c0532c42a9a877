"""The server optimizer: moves the global parameters by the mean delta, each replica of a silo its own slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from trainer.algorithms.algorithm import MakeOptimizer
from trainer.optim import step
from trainer.optim.optimizers import optimizer_state, restore_optimizer_state

Entry = Mapping[str, Any]


class Server:
    """A torch optimizer of some parts of a vector, each a parameter of its own, so that one can move before the next.

    The optimizer must be elementwise: then it moves every number as if it moved the whole vector.
    """

    def __init__(self, make: MakeOptimizer, vector: Tensor, parts: Sequence[slice]):
        self.parts = list(parts)
        self.parameters = {part.start: Parameter(vector[part], requires_grad=False) for part in parts}
        self.optimizer = make(list(self.parameters.values()))

    def step(self, part: slice, gradient: Tensor) -> None:
        """Moves a part of the vector."""
        parameter = self.parameters[part.start]
        parameter.grad = gradient
        step(self.optimizer)
        parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The live state of each part, by the place in the vector at which it starts."""
        state = optimizer_state(self.optimizer)
        return {str(self.parts[int(index)].start): entry for index, entry in state.items()}

    def load_state_dict(self, state: Mapping[str, Entry]) -> None:
        """Puts states back, whatever parts of the vector they were of."""
        saved = {int(start): entry for start, entry in state.items()}
        own = {str(index): cut(saved, part) for index, part in enumerate(self.parts) if saved}
        restore_optimizer_state(self.optimizer, own)


def cut(saved: Mapping[int, Entry], part: slice) -> dict[str, Any]:
    """The state of a part, out of those of other parts by where they start; what none of them has is zero."""
    entry = dict(saved[min(saved)])
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.dim():
            entry[name] = value.new_zeros(part.stop - part.start)
            for start, piece in _pieces(saved.items(), name):
                first, last = max(start, part.start), min(start + len(piece), part.stop)
                if first < last:
                    entry[name][first - part.start : last - part.start] = piece[first - start : last - start]
    return entry


def _pieces(saved: Iterable[tuple[int, Entry]], name: str) -> Iterator[tuple[int, Tensor]]:
    return ((start, entry[name]) for start, entry in saved)
