"""The regions of tensors that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A region of a tensor.

    offset  where it begins, in each dimension
    shape   of the region
    whole   the shape of the tensor
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.whole

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index of the whole tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.offset, self.shape, strict=True))


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape), tuple(shape))
