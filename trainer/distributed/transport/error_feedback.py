"""Error feedback between silos: the part of a vector that was not sent is kept, and sent with the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import SeedFor, Transport
from trainer.utils.trees import flatten

ResidualKind = Literal["payload", "total"]


class Residuals:
    """The parts of vectors that were not sent yet, in pieces, by vector, kind and start in the vector.

    All residuals are in the unit of a sum, as shares of the weighted mean of updates, so those of several silos may be
    added.

    payload  of the vectors that this silo has sent
    total    of the sums that this silo has made for all silos
    """

    def __init__(self):
        self.residuals: dict[tuple[str, ResidualKind, int], Tensor] = {}

    def residual(self, name: str, value_type: ResidualKind, start: int, like: Tensor) -> Tensor:
        """Return the live residual of a piece; zeros like the given tensor at first."""
        key = (name, value_type, start)
        if key not in self.residuals:
            self.residuals[key] = torch.zeros_like(like)
        return self.residuals[key]

    def subtract(self, name: str, vector: Tensor) -> Tensor:
        """Subtract all residuals of this name from a vector, in place."""
        for (of, _, start), piece in self.residuals.items():
            if of == name:
                vector[start : start + len(piece)].sub_(piece)
        return vector

    def state_dict(self) -> dict[str, Any]:
        """Return the live pieces, as a tree: vector, kind, start."""
        tree: dict[str, Any] = {}
        for (name, kind, start), piece in self.residuals.items():
            tree.setdefault(name, {}).setdefault(kind, {})[str(start)] = piece
        return tree

    def load(
        self, tree: Mapping[str, Any], spans: Sequence[slice], sums: Sequence[slice], device: torch.device
    ) -> None:
        """Add the residuals of a `state_dict`, whose pieces may be cut in another way.

        Args:
            tree: the state
            spans: the spans that this rank encodes as payloads
            sums: the spans that it sums, if the state is of the same world; empty otherwise, and residuals of totals
                are then added to those of payloads. Values after the last span are padding, and zero.
            device: of the vectors
        """
        for path, saved in flatten(tree).items():
            name, kind, offset = path.rsplit(".", 2)
            start, is_total = int(offset), kind == "total" and bool(sums)
            for span in sums if is_total else spans:
                first, last = max(start, span.start), min(start + len(saved), span.stop)
                if first < last:
                    like = saved.new_empty(span.stop - span.start, device=device)
                    piece = self.residual(name, "total" if is_total else "payload", span.start, like)
                    piece[first - span.start : last - span.start] += saved[first - start : last - start].to(device)


class ErrorFeedbackTransport(Transport):
    """Base of transports with residuals."""

    stateful = True

    def __init__(self, topology: Topology):
        super().__init__(topology)
        self.residuals = Residuals()

    def start_round(self, seed_for: SeedFor) -> None:
        self.seed_for = seed_for

    def flush(self, name: str, span: slice, values: Tensor) -> Tensor:
        residual = self.residuals.residual(name, "payload", span.start, values)
        values.add_(residual)
        residual.zero_()
        return values

    def lookahead(self, vector: Tensor, name: str) -> Tensor:
        if self.topology.num_silos == 1:
            return vector
        return self.all_gather(self.residuals.subtract(name, vector.clone()))
