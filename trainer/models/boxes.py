"""The regions of tensors that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


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
        return self.within(whole_box(self.whole))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the region as an index of another one that encloses it."""
        firsts = (first - start for first, start in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(first, first + size) for first, size in zip(firsts, self.shape, strict=True))


@dataclass(frozen=True)
class PlacedBox:
    """A box of a named tensor, flat in a vector.

    name   of the tensor
    start  of the box in the vector
    box    the region that the vector has
    """

    name: str
    start: int
    box: Box

    def of(self, vector: Tensor) -> Tensor:
        """Return the box as a view of the vector."""
        return vector[self.start : self.start + self.box.numel].view(self.box.shape)


def overlap(a: Box, b: Box) -> Box | None:
    """Return the region that two boxes of a tensor share; None if there is none."""
    firsts = tuple(map(max, a.offset, b.offset))
    lasts = [min(f + m, g + n) for f, m, g, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True)]
    shape = tuple(last - first for first, last in zip(firsts, lasts, strict=True))
    return Box(firsts, shape, a.whole) if all(size > 0 for size in shape) else None


def copy_overlap(values: Tensor, of: Box, into: Tensor, to: Box) -> None:
    """Copy the values of one box into those of another of the same tensor, where they overlap."""
    shared = overlap(of, to)
    if shared is not None:
        into[shared.within(to)] = values[shared.within(of)].to(into)


def whole_box(shape: Sequence[int]) -> Box:
    """Return the box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape), tuple(shape))
