"""Sources that wrap torch Datasets, map-style and iterable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from trainer.data.sources.column import as_targets, check_not_empty, first_outside, integer_column, label_column
from trainer.data.sources.padding import Padding
from trainer.utils.seeding import draw_from_generators, hash_numbers, seed_generators, separate_generators
from trainer.utils.tensor_trees import Tree, batch_error, num_examples, take

LABELS_COMPARED = 8
HINT = '\n  items of different lengths need a padding: MapDatasetSource(dataset, collate_fn=Padding({"input_ids": 0}))'

Collate = Callable[[list[Any]], Any]  # as torch's DataLoader takes it, to the inputs and the targets of a batch


@runtime_checkable
class SeekableDataset(Protocol):
    """Dataset that can be read from any example on, such as an IterableDataset with these two methods."""

    def __len__(self) -> int:
        """Return N, the number of examples."""
        ...

    def examples(self, start: int) -> Iterator[Any]:
        """Iterate over the pairs (input, target) number `start` to N - 1, the same ones at every call."""
        ...


class DatasetSource:
    """Base of the sources that read the items of a user's dataset.

    If the dataset draws from the default generators of torch, numpy or random, its draws are a pure function of a seed
    and the number of the example: the same on any number of ranks and after any restart. Items are then read one at a
    time, each with generators of its own seed.

    Args:
        dataset: its length is the number of examples.
        classes: number of classes; None for targets that are no labels.
        collate_fn: makes a batch of items, as that of torch's DataLoader; a `Padding` for items of different lengths.

    Raises:
        ValueError: there are no examples. `fetch` raises it for items that are not pairs of trees of tensors, and
            labels outside the classes.
    """

    is_read_by_batch = True

    def __init__(self, dataset: Any, classes: int | None = None, collate_fn: Collate = default_collate) -> None:
        check_not_empty(len(dataset))
        self.dataset, self.classes, self.collate_fn = dataset, classes, collate_fn
        self._is_random = False  # as far as known

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def padding(self) -> Padding | None:
        return self.collate_fn if isinstance(self.collate_fn, Padding) else None

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        return self.fetch_seeded(ids, 0)

    def fetch_seeded(self, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
        """Return the examples as `fetch` does; what the dataset draws for each is a function of the seed."""
        # A replica may have no example of a batch. It still needs an empty batch of the right shape.
        numbers = ids.tolist() or [0]
        inputs, targets = self._collate(self._read(numbers, seed))
        if self.classes and (outside := first_outside(targets, self.classes)):
            row, label = outside
            raise ValueError(
                f"{type(self.dataset).__name__} gives label {label} in example {numbers[row]}, "
                f"but there are {self.classes} classes: 0 to {self.classes - 1}"
            )
        return (inputs, targets) if len(ids) else take((inputs, targets), slice(0))

    def _collate(self, items: list[Any]) -> tuple[Tree, Tree]:
        name = type(self.dataset).__name__
        try:
            batch = self.collate_fn(items)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name}: {len(items)} items make no batch: {str(error).splitlines()[0]}{HINT}") from error
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            raise ValueError(
                f"{name} gives items that are not (input, target) pairs.\n"
                "  wrap it in a Dataset whose items are pairs; the input may be a dict of tensors"
            )
        for part, tree in zip(("inputs", "targets"), batch, strict=True):
            if error := batch_error(tree):
                raise ValueError(f"{name}: the {part} of a batch are no tensors: {error}")
        if num_examples(batch[0]) != num_examples(batch[1]):
            raise ValueError(
                f"{name}: a batch has {num_examples(batch[0])} inputs and {num_examples(batch[1])} targets"
            )
        return batch[0], as_targets(batch[1])

    def _read(self, numbers: list[int], seed: int) -> list[Any]:
        with separate_generators():
            if not self._is_random:
                seed_generators(0)
                unused = draw_from_generators()
                seed_generators(0)
                items = self._get_items(numbers)
                self._is_random = draw_from_generators() != unused
                if not self._is_random:
                    return items
            items = []
            for number, item_seed in zip(numbers, hash_numbers(np.array(numbers), seed).tolist(), strict=True):
                self._seek(number)
                seed_generators(item_seed)
                items += self._get_items([number])
            return items

    def _seek(self, number: int) -> None:
        """Go to the example, if the dataset has a position."""

    def _get_items(self, numbers: list[int]) -> list[Any]:
        raise NotImplementedError


class MapDatasetSource(DatasetSource):
    """Source of a map-style torch Dataset of (input, target) pairs.

    A batch is `dataset.__getitems__(ids)` where the dataset has that method, else one item at a time. An input may be a
    tensor, or a tuple, list or dict of inputs.

    Args:
        dataset: any map-style Dataset of pairs.
        labels: int64 [N]. By default `dataset.targets` or `dataset.labels`, as torchvision calls them, if the items
            have the same labels.
        client_ids: natural client of every example, int64 [N].
        classes: number of classes, outside of which `fetch` refuses integer targets; None for other targets.
        collate_fn: makes a batch of items, as that of torch's DataLoader; a `Padding` for items of different lengths.

    Raises:
        ValueError: there are no examples, or a column has another length.
    """

    def __init__(
        self,
        dataset: Any,
        labels: np.ndarray | None = None,
        client_ids: np.ndarray | None = None,
        classes: int | None = None,
        collate_fn: Collate = default_collate,
    ) -> None:
        super().__init__(dataset, classes, collate_fn)
        self.client_ids = integer_column("client_ids", client_ids, len(dataset))
        self._labels = integer_column("labels", labels, len(dataset))

    @property
    def labels(self) -> np.ndarray | None:
        return self._found_labels if self._labels is None else self._labels

    @cached_property
    def _found_labels(self) -> np.ndarray | None:
        for name in ("targets", "labels"):
            column = _integer_vector(getattr(self.dataset, name, None))
            if column is not None and len(column) == len(self) and self._matches_items(column):
                return column
        return None

    def _matches_items(self, column: np.ndarray) -> bool:
        """Compare a few items with the column: they differ if the dataset transforms its targets."""
        some = np.linspace(0, len(self) - 1, min(len(self), LABELS_COMPARED), dtype=np.int64)
        labels = label_column(self.fetch(torch.from_numpy(some))[1])
        return labels is not None and np.array_equal(labels, column[some])

    def _get_items(self, numbers: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(numbers)
        return [self.dataset[number] for number in numbers]


class IterableSource(DatasetSource):
    """Source of a dataset that is read in order.

    Ids requested in ascending order are read in one pass. Skipped examples are read and dropped. A smaller id opens a
    new iterator at that id. The position follows from the ids alone, so there is no state to checkpoint. One of several
    workers opens a new iterator for each of its batches: otherwise each would read what all of them do.

    Raises:
        ValueError: there are no examples. `fetch` raises it where the dataset ends before its length.
    """

    labels: np.ndarray | None = None
    client_ids: np.ndarray | None = None
    is_sequential = True

    def __init__(
        self, dataset: SeekableDataset, classes: int | None = None, collate_fn: Collate = default_collate
    ) -> None:
        super().__init__(dataset, classes, collate_fn)
        self._iterator: Iterator[Any] = iter(())
        self._position = len(dataset)  # id of the next example of the iterator

    def fetch_seeded(self, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
        ascending, inverse = ids.unique(return_inverse=True)
        return take(super().fetch_seeded(ascending, seed), inverse)

    def _get_items(self, numbers: list[int]) -> list[Any]:
        items = []
        for number in numbers:
            self._seek(number)
            items.append(self._next())
        return items

    def _seek(self, number: int) -> None:
        worker = get_worker_info()
        reads_past = worker is None or worker.num_workers == 1
        if number < self._position or (number > self._position and not reads_past):
            self._iterator, self._position = self.dataset.examples(number), number
        while self._position < number:
            self._next()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: all but the iterator, which cannot be sent."""
        return self.__dict__ | {"_iterator": iter(()), "_position": len(self)}

    def _next(self) -> Any:
        for example in self._iterator:
            self._position += 1
            return example
        raise ValueError(
            f"{type(self.dataset).__name__} ended before example {self._position}, and its length is {len(self)}.\n"
            "  examples(start) must yield all examples from start on, the same ones at every call"
        )


def is_sequential(source: object) -> bool:
    """Return whether the source is read, and trained on, in its own order."""
    return getattr(source, "is_sequential", False)


def is_read_by_batch(source: object) -> bool:
    """Return whether no more than a batch of the source should be fetched at once in training."""
    return getattr(source, "is_read_by_batch", False)


def _integer_vector(values: Any) -> np.ndarray | None:
    """Return the values as int64 [N] if they are a vector, an array or a list of integers."""
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        values = torch.tensor(values)
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values) if np.issubdtype(values.dtype, np.integer) else None
    return label_column(values) if isinstance(values, Tensor) else None
