"""Weights of training examples in the loss, and of clients in aggregation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.data.sources.column import NUMBERS, NamedColumn
from trainer.utils.errors import raise_errors


@dataclass(frozen=True)
class ExampleWeights:
    """Weights of examples and clients.

    Attributes:
        examples: float32 [N], by id of the training source. With per-client files, only those of local examples are
            meaningful.
        clients: n_k, the sum of the weights of a client's training examples, by client; equal on all ranks.
    """

    examples: Tensor
    clients: tuple[float, ...]

    def of(self, ids: Tensor) -> Tensor | None:
        """Return the weights of these examples; None if all are 1, so that training takes the unweighted path."""
        weights = self.examples[ids]
        return None if bool((weights == 1).all()) else weights


def parse_weights(column: NamedColumn | None, errors: list[str]) -> np.ndarray | None:
    """Return the weights as float32 [N]; append errors unless they are finite, at least 0, and not all 0."""
    if column is None:
        return None
    column = column.squeeze()
    if not column.has_kind(NUMBERS) or column.values.ndim != 1:
        errors.append(f"{column.description}: weights must be one number per example")
        return None
    values = column.as_float32(errors)
    if (bad := values < 0).any():
        errors.append(column.error(bad, f"negative, such as {values[bad.argmax()]:g}; a weight is 0 or more"))
    elif not values.any():
        errors.append(f"{column.name}: all weights are 0, so there is nothing to learn from")
    return values


def validate_weights(weights: np.ndarray | None, examples: int) -> np.ndarray | None:
    """Return the weights as float32 [examples], None for None; raise ValueError listing every problem."""
    if weights is None:
        return None
    column, errors = NamedColumn("weights", np.atleast_1d(np.asarray(weights))), []
    if len(column.values) != examples:
        errors.append(f"{column.description} for {examples} training examples: each needs one weight")
    values = parse_weights(column, errors)
    raise_errors(errors)
    return values
