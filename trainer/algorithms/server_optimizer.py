"""The server optimizer: moves the global parameters by the mean delta, each replica of a silo its own slice."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from trainer.models.flat import blocks_of
from trainer.optim import step
from trainer.optim.optimizers import OptimizerFactory, optimizer_state, restore_optimizer_state

Entry = Mapping[str, Any]
OffsetEntry = tuple[int, Entry]  # what is kept of a part of a vector, and where the part starts
OFFSET = itemgetter(0)


class ServerOptimizer:
    """Moves some parts of a vector, each by a torch optimizer of its own, block by block.

    So one part can move before the next has come, and one block while it is in the cache. The optimizer must be
    elementwise: then it moves every number as if it moved the whole vector. There is one for each part because a step
    looks at all parameters of its optimizer, and a vector may have thousands of blocks.
    """

    def __init__(self, make: OptimizerFactory, vector: Tensor, chunks: Sequence[slice]):
        self.blocks = [blocks_of(vector, part) for part in chunks]
        parameters = [[Parameter(vector[block], requires_grad=False) for block in blocks] for blocks in self.blocks]
        self.optimizers = [make(own) for own in parameters]
        self.by_offset = {
            block.start: (parameter, optimizer)
            for blocks, own, optimizer in zip(self.blocks, parameters, self.optimizers, strict=True)
            for block, parameter in zip(blocks, own, strict=True)
        }

    def step(self, block: slice, gradient: Tensor) -> None:
        """Moves a block of the vector."""
        parameter, optimizer = self.by_offset[block.start]
        parameter.grad = gradient
        step(optimizer)
        parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The live state of each block, by the place in the vector at which it starts."""
        states = zip(self.blocks, map(optimizer_state, self.optimizers), strict=True)
        return {str(blocks[int(index)].start): entry for blocks, state in states for index, entry in state.items()}

    def load_state_dict(self, state: Mapping[str, Entry]) -> None:
        """Puts states back, whatever blocks of the vector they were of."""
        saved = sorted_by_offset(state)
        for blocks, optimizer in zip(self.blocks, self.optimizers, strict=True):
            # A block that has never moved, such as one of a later fragment, starts as the optimizer starts.
            own = {
                str(index): extract_range(saved, block) for index, block in enumerate(blocks) if reaching(saved, block)
            }
            restore_optimizer_state(optimizer, own)


def sorted_by_offset(state: Mapping[str, Entry]) -> list[OffsetEntry]:
    """What was saved of parts of a vector, by the places at which they start."""
    return sorted((int(start), entry) for start, entry in state.items())


def reaching(saved: Sequence[OffsetEntry], part: slice) -> list[OffsetEntry]:
    """Those of the saved states, in their order, that reach into the part."""
    # A vector may have thousands of parts, so the first one is found by bisection.
    first = max(bisect_right(saved, part.start, key=OFFSET) - 1, 0)
    near = saved[first : bisect_left(saved, part.stop, key=OFFSET)]
    return [(start, entry) for start, entry in near if start + _length(entry) > part.start]


def extract_range(saved: Sequence[OffsetEntry], part: slice) -> dict[str, Any]:
    """The state of a part, out of those of others, in their order; what none of them has is zero.

    Numbers without a place, such as a count of steps, are those of the first state that reaches into the part. They
    are copied: an optimizer counts in place, and each of its blocks by itself.
    """
    near = reaching(saved, part)
    entry = dict((near or saved)[0][1])
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            continue
        if not value.dim():
            entry[name] = value.clone()
            continue
        entry[name] = value.new_zeros(part.stop - part.start)
        for start, piece in ((start, other[name]) for start, other in near):
            first, last = max(start, part.start), min(start + len(piece), part.stop)
            if first < last:
                entry[name][first - part.start : last - part.start] = piece[first - start : last - start]
    return entry


def _length(entry: Entry) -> float:
    """The length of the part of the vector that a state is of; infinite for a state without vectors."""
    return max((len(value) for value in entry.values() if isinstance(value, Tensor) and value.dim()), default=math.inf)
