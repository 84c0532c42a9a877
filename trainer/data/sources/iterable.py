"""Examples that can only be read one after the other, as a source of numbered ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from trainer.data.sources.collate import collate


@runtime_checkable
class SeekableDataset(Protocol):
    """A data set that can be read from any of its examples on, such as an IterableDataset with these two methods."""

    def __len__(self) -> int:
        """N, the number of examples."""
        ...

    def examples(self, start: int) -> Iterator[Any]:
        """The pairs (input, target) number `start` to N - 1; the same ones at every call."""
        ...


class IterableSource:
    """A data set that is read in its order, as a Source: what is asked for in that order is read once.

    Whoever asks for examples further on reads those between and drops them; whoever goes back begins anew, at the
    example asked for. So the place in it is in the numbers of the examples alone: nothing is to be saved. `fetch`
    raises ValueError where there are fewer examples than the data set has said.
    """

    labels: np.ndarray | None = None
    client_ids: np.ndarray | None = None

    def __init__(self, dataset: SeekableDataset) -> None:
        self.dataset = dataset
        self.remaining: Iterator[Any] = iter(())
        self.next = len(dataset)  # the number of the first of the remaining ones
        if len(dataset) == 0:
            raise ValueError("a data set without a single example cannot be trained on or tested with")

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        ascending, back = ids.unique(return_inverse=True)
        # A replica may have no example of a batch: it still needs an empty one of the right shape.
        inputs, targets = collate(self.dataset, [self._read(number) for number in ascending.tolist() or [0]])
        return inputs[back], targets[back]

    def _read(self, number: int) -> Any:
        if number < self.next:
            self.remaining, self.next = self.dataset.examples(number), number
        for example in self.remaining:
            self.next += 1
            if self.next > number:
                return example
        raise ValueError(
            f"{type(self.dataset).__name__} has ended before example {number}, and its length is {len(self)}.\n"
            "  its examples(start) must give all from start on, and the same ones at every call"
        )
