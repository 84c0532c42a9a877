"""Error feedback: what a codec lost of a vector is kept, and sent with the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ResidualKind = Literal["payload", "total"]


class Residuals:
    """What of vectors was not sent yet, in pieces, each known by the place in its vector at which it starts.

    All are in the unit of a total: shares of the weighted mean of deltas. So those of several silos may be added.

    payload  of what this silo has sent
    total    of the sums that this silo has made for all
    """

    def __init__(self):
        self.residuals: dict[tuple[str, ResidualKind, int], Tensor] = {}

    def residual(self, name: str, value_type: ResidualKind, start: int, like: Tensor) -> Tensor:
        """The live numbers held back of a piece of the vector of this name; zeros at first."""
        key = (name, value_type, start)
        if key not in self.residuals:
            self.residuals[key] = torch.zeros_like(like)
        return self.residuals[key]

    def flush(self, name: str, start: int, values: Tensor) -> Tensor:
        """The values with what was held back of payloads, of a silo that is now alone, and holds nothing back."""
        residual = self.residual(name, "payload", start, values)
        values.add_(residual)
        residual.zero_()
        return values

    def subtract(self, name: str, vector: Tensor) -> Tensor:
        """The vector less what was held back of those of this name, in place."""
        for (of, _, start), piece in self.residuals.items():
            if of == name:
                vector[start : start + len(piece)].sub_(piece)
        return vector

    def state_dict(self) -> dict[str, Any]:
        """The live pieces, as a tree: vector, kind, start."""
        tree: dict[str, Any] = {}
        for (name, kind, start), piece in self.residuals.items():
            tree.setdefault(name, {}).setdefault(kind, {})[str(start)] = piece
        return tree

    def load(
        self, tree: Mapping[str, Any], spans: Sequence[slice], sums: Sequence[slice], device: torch.device
    ) -> None:
        """Adds a `state_dict`, in which vectors were perhaps in other pieces: this rank packs these `spans` of them.

        It makes the `sums`, if they were made in the same world; their residuals stay what they are. In another world
        they become those of payloads: nothing is lost. Numbers behind the last span are padding, and zero.
        """
        for name, kind, start, saved in _iter_residuals(tree):
            stays = kind == "total" and bool(sums)
            for own in sums if stays else spans:
                first, last = max(start, own.start), min(start + len(saved), own.stop)
                if first < last:
                    like = saved.new_empty(own.stop - own.start, device=device)
                    piece = self.residual(name, "total" if stays else "payload", own.start, like)
                    piece[first - own.start : last - own.start] += saved[first - start : last - start].to(device)


def _iter_residuals(tree: Mapping[str, Any]) -> Iterator[tuple[str, ResidualKind, int, Tensor]]:
    for name, kinds in tree.items():
        for kind, pieces in kinds.items():
            for start, piece in pieces.items():
                yield name, kind, int(start), piece
