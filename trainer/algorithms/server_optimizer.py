"""The server optimizer: moves the global parameters by the mean update, each replica of a silo its own shard."""

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
OffsetEntry = tuple[int, Entry]  # the offset of a part of a vector, and its state
OFFSET = itemgetter(0)


class ServerOptimizer:
    """Moves chunks of a vector, each by a torch optimizer of its own, block by block.

    One chunk can thus move before the next has arrived, and one block while it is in the processor's cache. The
    optimizer must be elementwise: then it moves every number as if it moved the whole vector. There is one optimizer
    for each chunk because a step looks at all parameters of its optimizer, and a vector may have thousands of blocks.

    Args:
        make: makes the optimizers.
        vector: the vector [n], moved in place.
        chunks: those parts of it that this rank moves.
    """

    def __init__(self, make: OptimizerFactory, vector: Tensor, chunks: Sequence[slice]):
        self.blocks = [blocks_of(vector, part) for part in chunks]
        parameters = [[Parameter(vector[block], requires_grad=False) for block in blocks] for blocks in self.blocks]
        self.optimizers = [make(chunk) for chunk in parameters]
        self.by_offset = {
            block.start: (parameter, optimizer)
            for blocks, of_chunk, optimizer in zip(self.blocks, parameters, self.optimizers, strict=True)
            for block, parameter in zip(blocks, of_chunk, strict=True)
        }

    def step(self, block: slice, gradient: Tensor) -> None:
        """Move a block of the vector, given its gradient."""
        parameter, optimizer = self.by_offset[block.start]
        parameter.grad = gradient
        step(optimizer)
        parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the live state of each block, by its offset in the vector."""
        states = zip(self.blocks, map(optimizer_state, self.optimizers), strict=True)
        return {str(blocks[int(index)].start): entry for blocks, state in states for index, entry in state.items()}

    def load_state_dict(self, state: Mapping[str, Entry]) -> None:
        """Restore states, whatever the blocks were from which they come."""
        saved = sorted_by_offset(state)
        for blocks, optimizer in zip(self.blocks, self.optimizers, strict=True):
            # A block that has never moved, such as one of a later fragment, starts as the optimizer starts.
            state_of_chunk = {
                str(index): extract_range(saved, block)
                for index, block in enumerate(blocks)
                if overlapping_states(saved, block)
            }
            restore_optimizer_state(optimizer, state_of_chunk)


def sorted_by_offset(state: Mapping[str, Entry]) -> list[OffsetEntry]:
    """Return the states of parts of a vector, sorted by offset."""
    return sorted((int(start), entry) for start, entry in state.items())


def overlapping_states(saved: Sequence[OffsetEntry], part: slice) -> list[OffsetEntry]:
    """Return those of the sorted states that overlap with a part."""
    # A vector may have thousands of parts, so the first one is found by bisection.
    first = max(bisect_right(saved, part.start, key=OFFSET) - 1, 0)
    near = saved[first : bisect_left(saved, part.stop, key=OFFSET)]
    return [(start, entry) for start, entry in near if start + _length(entry) > part.start]


def extract_range(saved: Sequence[OffsetEntry], part: slice) -> dict[str, Any]:
    """Extract the state of a part from the sorted states of others; numbers that none of them has are zero.

    Scalars, such as a count of steps, are those of the first state that overlaps. They are copied: an optimizer counts
    in place, and each of its blocks by itself.
    """
    overlapping = overlapping_states(saved, part)
    entry = dict((overlapping or saved)[0][1])
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            continue
        if not value.dim():
            entry[name] = value.clone()
            continue
        entry[name] = value.new_zeros(part.stop - part.start)
        for start, piece in ((start, other[name]) for start, other in overlapping):
            first, last = max(start, part.start), min(start + len(piece), part.stop)
            if first < last:
                entry[name][first - part.start : last - part.start] = piece[first - start : last - start]
    return entry


def _length(entry: Entry) -> float:
    """Return the length of the part to which a state belongs; infinite for a state without vectors."""
    return max((len(value) for value in entry.values() if isinstance(value, Tensor) and value.dim()), default=math.inf)
