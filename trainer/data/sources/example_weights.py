"""How much each example counts in the loss, and with its examples each client in the combination."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.data.sources.column import NUMBERS, NamedColumn


@dataclass(frozen=True)
class ExampleWeights:
    """What examples and clients count.

    examples  float32 [N], by the ids of the training source; where examples lie apart, only those that are here tell
    clients   n_k, the sum of the weights of its training examples, by client; equal on all ranks
    """

    examples: Tensor
    clients: tuple[float, ...]

    def of(self, ids: Tensor) -> Tensor | None:
        """Those of these examples; None where all are 1, so that such a client is trained as one without weights."""
        found = self.examples[ids]
        return None if bool((found == 1).all()) else found


def parse_weights(column: NamedColumn | None, errors: list[str]) -> np.ndarray | None:
    """The weights in a column, float32 [N]; what is wrong with them is added to the faults.

    A weight is a finite number from 0, and not all are 0.
    """
    if column is None:
        return None
    column = column.vector()
    if not column.has_kind(NUMBERS) or column.values.ndim != 1:
        errors.append(f"{column.description}, where a weight is one number an example")
        return None
    values = column.finite(errors)
    if (bad := values < 0).any():
        errors.append(column.error(bad, f"negative, such as {values[bad.argmax()]:g}, where a weight is 0 or more"))
    elif not values.any():
        errors.append(f"{column.name}: all weights are 0, so that there is nothing to learn from")
    return values


def validate_weights(weights: np.ndarray | None, examples: int) -> np.ndarray | None:
    """The weights of so many examples, float32 [N], or None for None; ValueError with all that is wrong with them."""
    if weights is None:
        return None
    column, errors = NamedColumn("weights", np.atleast_1d(np.asarray(weights))), []
    if len(column.values) != examples:
        errors.append(f"{column.description} for {examples} training examples: there is one weight for each")
    values = parse_weights(column, errors)
    if errors:
        raise ValueError("\n".join(errors))
    return values
