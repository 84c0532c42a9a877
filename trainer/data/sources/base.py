"""Where examples come from: one small protocol, and the sources that fulfil it for what is in memory."""

from __future__ import annotations

from collections.abc import Sized
from copy import copy
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from trainer.data.sources.collate import collate
from trainer.data.sources.example_weights import validate_weights
from trainer.data.sources.iterable import IterableSource, SeekableDataset
from trainer.utils.hardware import to_device

LABELS_COMPARED = 8


@runtime_checkable
class Source(Protocol):
    """Examples numbered 0 .. N-1, fetched a batch at a time."""

    def __len__(self) -> int:
        """N, the number of examples."""
        ...

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the examples `ids` (int64 [B]), both with B as their first dimension."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """The label of every example, int64 [N]: what partitions by label cut. None where there are none."""
        ...

    @property
    def client_ids(self) -> np.ndarray | None:
        """The natural client of every example, int64 [N]. None where nobody owns them."""
        ...


@runtime_checkable
class Fingerprintable(Protocol):
    """A Source that can be told from another one by its content."""

    def fingerprint_data(self) -> list[np.ndarray]:
        """All its examples; or of more than can be read in a moment, a part that no change is likely to spare."""
        ...


@runtime_checkable
class DeviceMovable(Source, Protocol):
    """A Source that can be held in the memory of a device, of which it takes `nbytes`."""

    @property
    def nbytes(self) -> int: ...

    def to(self, device: torch.device) -> Source:
        """The same source, whose `fetch` gives what lies on that device for ids that lie anywhere."""
        ...


class TensorSource:
    """Tensors in memory as a Source: inputs [N, ...], targets [N, ...].

    The targets are the labels as well where they are a vector of integers. Raises ValueError when there are no examples
    or when inputs, targets and owners disagree on their number.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, client_ids: np.ndarray | None = None) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"{len(inputs)} inputs and {len(targets)} targets: every example needs one of each.\n"
                f"  got inputs of shape {list(inputs.shape)} and targets of shape {list(targets.shape)}"
            )
        self.inputs = inputs
        self.targets = targets
        self.labels = label_column(targets)
        self.client_ids = column("owners", client_ids, len(inputs))

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = to_device(ids, self.inputs.device)
        return self.inputs.index_select(0, ids), self.targets.index_select(0, ids)

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + self.targets.nbytes

    def to(self, device: torch.device) -> TensorSource:
        moved = copy(self)
        moved.inputs, moved.targets = self.inputs.to(device), self.targets.to(device)
        return moved

    def fingerprint_data(self) -> list[np.ndarray]:
        return [self.inputs.numpy(), self.targets.numpy()]


class SequenceWindows:
    """Windows of a text as a Source: the inputs are `length` tokens, the targets the same tokens one place later.

    `tokens` is uint8 [N, length + 1], a row for each window; it may be a view whose rows overlap. Batches are int64
    [B, length]. Raises ValueError when there are no rows, when they are not length + 1 wide, or when the owners
    are not N.
    """

    labels: np.ndarray | None = None

    def __init__(self, tokens: Tensor, length: int, client_ids: np.ndarray | None = None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != length + 1:
            raise ValueError(
                f"windows of length={length} need rows of {length + 1} tokens; got shape {list(tokens.shape)}"
            )
        self.tokens = tokens
        self.length = length
        self.client_ids = column("owners", client_ids, len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.tokens.index_select(0, to_device(ids, self.tokens.device))
        return rows[:, :-1].long(), rows[:, 1:].long()

    @property
    def nbytes(self) -> int:
        return self.tokens.untyped_storage().nbytes()

    def to(self, device: torch.device) -> SequenceWindows:
        """With rows that overlap as they do here, and so no more memory."""
        moved, own = copy(self), self.tokens
        whole = own.as_strided((self.nbytes // own.element_size(),), (1,), 0).to(device, copy=True)
        moved.tokens = whole.as_strided(own.shape, own.stride(), own.storage_offset())
        return moved

    def fingerprint_data(self) -> list[np.ndarray]:
        return [self.tokens.numpy()]


class MapDatasetSource:
    """Any map-style torch Dataset of (input, target) pairs as a Source.

    A batch is `dataset.__getitems__(ids)` where the data set has it, else an item at a time, collated by torch's
    `default_collate`. `labels` and `client_ids` (int64 [N]) are what it can be dealt out by; labels that are not given are
    the data set's `targets` or `labels`, as torchvision calls them, if its items have the same. Raises ValueError when
    there are no examples or when a column's length is not N; `fetch` raises it for items that are not pairs.
    """

    def __init__(self, dataset: Any, labels: np.ndarray | None = None, client_ids: np.ndarray | None = None) -> None:
        self.dataset = dataset
        self.labels = column("labels", labels, len(dataset))
        self.client_ids = column("owners", client_ids, len(dataset))
        if labels is None:
            self.labels = self._read_labels()

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # A replica may have no example of a batch: it still needs an empty one of the right shape.
        inputs, targets = collate(self.dataset, self._get_items(ids.tolist() or [0]))
        return inputs[: len(ids)], targets[: len(ids)]

    def _read_labels(self) -> np.ndarray | None:
        for name in ("targets", "labels"):
            column = _integers(getattr(self.dataset, name, None))
            if column is not None and len(column) == len(self) and self._matches(column):
                return column
        return None

    def _matches(self, column: np.ndarray) -> bool:
        """Whether examples from all over have these labels; they do not where the targets are transformed."""
        some = np.linspace(0, len(self) - 1, min(len(self), LABELS_COMPARED), dtype=np.int64)
        found = label_column(self.fetch(torch.from_numpy(some))[1])
        return np.array_equal(found, column[some]) if found is not None else False

    def _get_items(self, ids: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(ids)
        return [self.dataset[i] for i in ids]


class DataSplits:
    """A data set: what is trained on, what is tested on, and what its labels and owners are called.

    `train` and `test` are Sources, whatever they are made from (see `as_source`). `classes` is the number of classes,
    or of tokens in the vocabulary; None where the task is not a classification. `weights` are what each training
    example counts in the loss, N numbers from 0; None: all the same. Raises ValueError for others.
    """

    def __init__(
        self,
        train: Source | Dataset[Any],
        test: Source | Dataset[Any],
        classes: int | None,
        client_names: tuple[str, ...] = (),
        label_names: tuple[str, ...] = (),
        weights: np.ndarray | None = None,
    ) -> None:
        self.train, self.test = as_source(train), as_source(test)
        self.weights = validate_weights(weights, len(self.train))
        self.classes = classes
        self.client_names = client_names
        self.label_names = label_names


def as_source(dataset: Source | Dataset[Any]) -> Source:
    """The data set as a Source: a Source stays, a TensorDataset of two is taken by its tensors, a Dataset is wrapped.

    An IterableDataset is one if it is `SeekableDataset`. Raises ValueError for others, and for what cannot be indexed.
    """
    if isinstance(dataset, Source):
        return dataset
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return TensorSource(*dataset.tensors)
    if isinstance(dataset, Dataset) and isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
        return MapDatasetSource(dataset)
    if isinstance(dataset, IterableDataset) and isinstance(dataset, SeekableDataset):
        return IterableSource(dataset)
    raise ValueError(
        f"a data set must be one of these, got {type(dataset).__name__}:\n"
        "  a Source (__len__, fetch, labels, owners), a TensorDataset of two tensors,\n"
        "  or a map-style torch Dataset (__len__, __getitem__) of (input, target) pairs.\n"
        "  An IterableDataset needs __len__() and examples(start), an iterator from that example on:\n"
        "  otherwise its examples have no numbers, by which they are dealt out, and found again after a restart"
    )


def label_column(targets: Tensor) -> np.ndarray | None:
    """The targets as labels, int64 [N], if they are a vector of integers."""
    integers = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return targets.to("cpu", torch.int64).numpy() if integers and targets.ndim == 1 else None


def _integers(values: Any) -> np.ndarray | None:
    """The values as a vector of int64, if they are a vector, an array or a list of integers."""
    if isinstance(values, list) and all(isinstance(value, int) for value in values):
        values = torch.tensor(values)
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values) if np.issubdtype(values.dtype, np.integer) else None
    return label_column(values) if isinstance(values, Tensor) else None


def column(name: str, values: np.ndarray | None, examples: int) -> np.ndarray | None:
    """The values as int64 [examples], or None for None."""
    if examples == 0:
        raise ValueError("a data set without a single example cannot be trained on or tested with")
    if values is None:
        return None
    column = np.asarray(values)
    if column.shape != (examples,) or not np.issubdtype(column.dtype, np.integer):
        raise ValueError(
            f"{name}= must be one integer for each of {examples} examples; got {column.dtype} {list(column.shape)}"
        )
    return column.astype(np.int64)
