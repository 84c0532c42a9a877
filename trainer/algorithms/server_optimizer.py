"""The server optimizer: moves the global parameters by the mean update, each replica of a silo its own shard."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from trainer.models.flat import blocks_of
from trainer.optim import step
from trainer.optim.optimizers import OptimizerFactory
from trainer.optim.state import OptimizerState

Entry = Mapping[str, Any]
OffsetEntry = tuple[int, Entry]  # the offset of a part of a vector, and its state
OFFSET = itemgetter(0)
LENGTH = "length"  # of the part, where its state may have no vectors


class ServerOptimizer:
    """Moves chunks of a vector block by block, each by a torch optimizer of its own.

    One chunk can thus move before the next has arrived, and one block while it is in the processor's cache. The
    optimizer must be elementwise: then it moves every number as if it moved the whole vector. Each block has its own,
    because a step looks at all parameters of its optimizer, and counts one step of all.

    Args:
        make: makes the optimizers.
        vector: the vector [n], moved in place.
        chunks: those parts of it that this rank moves.
    """

    def __init__(self, make: OptimizerFactory, vector: Tensor, chunks: Sequence[slice]):
        self.blocks = [block for part in chunks for block in blocks_of(vector, part)]
        self.parameters = {block.start: Parameter(vector[block], requires_grad=False) for block in self.blocks}
        self.states = {start: OptimizerState(make([parameter])) for start, parameter in self.parameters.items()}

    def step(self, block: slice, gradient: Tensor) -> None:
        """Move a block of the vector, given its gradient."""
        parameter = self.parameters[block.start]
        parameter.grad = gradient
        step(self.states[block.start].optimizer)
        parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the live state of each block that has one, and its length, by its offset in the vector."""
        states = [(block, self.states[block.start].state_dict()) for block in self.blocks]
        return {str(block.start): {**state, LENGTH: block.stop - block.start} for block, state in states if state}

    def load_state_dict(self, state: Mapping[str, Entry]) -> None:
        """Restore states, whatever the blocks were from which they come."""
        saved = sorted_by_offset(state)
        for block in self.blocks:
            # A block that has never moved, such as one of a later fragment, starts as the optimizer starts.
            is_saved = bool(overlapping_states(saved, block))
            self.states[block.start].load_state_dict(extract_range(saved, block) if is_saved else {})


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
    return _extract(overlapping_states(saved, part) or saved[:1], part)


def _extract(overlapping: Sequence[OffsetEntry], part: slice) -> dict[str, Any]:
    entry = dict(overlapping[0][1])
    for name, value in entry.items():
        pieces = [(start, other[name]) for start, other in overlapping if name in other]
        if isinstance(value, Mapping):
            entry[name] = _extract(pieces, part)
        elif isinstance(value, Tensor) and not value.dim():
            entry[name] = value.clone()
        elif isinstance(value, Tensor):
            entry[name] = value.new_zeros(part.stop - part.start)
            for start, piece in pieces:
                first, last = max(start, part.start), min(start + len(piece), part.stop)
                if first < last:
                    entry[name][first - part.start : last - part.start] = piece[first - start : last - start]
    return entry


def _length(entry: Entry) -> int:
    """Return the length of the part to which a state belongs."""
    if LENGTH in entry:
        return entry[LENGTH]
    return max(len(value) for value in entry.values())
