"""The Source protocol, sources in memory, and the data set made of a source for each part."""

from __future__ import annotations

from collections.abc import Sized
from copy import copy
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from trainer.data.sources.agreement import Agreement, Alone
from trainer.data.sources.column import as_targets, check_not_empty, integer_column, label_column
from trainer.data.sources.example_weights import validate_weights
from trainer.data.sources.text_format import TextFormat
from trainer.data.sources.torch_datasets import IterableSource, MapDatasetSource, SeekableDataset
from trainer.utils.hardware import to_device
from trainer.utils.seeding import Tag, derive_seed
from trainer.utils.tensor_trees import Tree, batch_error, first_tensor, map_tensors, named_tensors, nbytes, num_examples

if TYPE_CHECKING:
    from trainer.data.sources.table import TableEncoder


@runtime_checkable
class Source(Protocol):
    """Examples numbered 0 to N - 1, fetched a batch at a time.

    Inputs are a tensor, or a tuple, list or dict of inputs; every tensor has a first dimension for the examples. So are
    targets, if the task takes them.

    A source that must be read in order has an attribute `is_sequential = True`. One that draws random numbers has a
    method `fetch_seeded(ids, seed)`, whose result is a function of both; `fetch` is that of one seed. A source of
    examples of different lengths has the attribute `padding`, the `Padding` by which it makes batches of them. Such a
    source, and one that is slow, has `is_read_by_batch = True`: no more than a batch is fetched at once in training.
    """

    def __len__(self) -> int:
        """Return N, the number of examples."""
        ...

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        """Return inputs [B, ...] and targets [B, ...] of the examples `ids`, int64 [B]."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Label of every example, int64 [N], for partitions by label; None if there are none."""
        ...

    @property
    def client_ids(self) -> np.ndarray | None:
        """Natural client of every example, int64 [N]; None if there are none."""
        ...


@runtime_checkable
class Fingerprintable(Protocol):
    """Source whose content can be checksummed."""

    def fingerprint_data(self) -> list[np.ndarray]:
        """Return all examples, or of a large source a sample that any likely change affects."""
        ...


@runtime_checkable
class DeviceMovable(Source, Protocol):
    """Source that can be held in the memory of a device, where it takes `nbytes`."""

    @property
    def nbytes(self) -> int: ...

    def to(self, device: torch.device) -> Source:
        """Return the source on the device; its `fetch` takes ids on any device."""
        ...


class TensorSource:
    """Source of tensors in memory: inputs [N, ...] and targets [N, ...], or trees of them such as dicts.

    Integer targets are fetched as int64; a vector of them is the labels as well.

    Raises:
        ValueError: there are no examples, or inputs, targets and client ids differ in length.
    """

    def __init__(self, inputs: Tree, targets: Tree, client_ids: np.ndarray | None = None) -> None:
        for name, tree in (("inputs", inputs), ("targets", targets)):
            if error := batch_error(tree):
                raise ValueError(f"{name}: {error}")
        count = num_examples(inputs)
        if count != num_examples(targets):
            raise ValueError(
                f"{count} inputs and {num_examples(targets)} targets: every example needs one of each.\n"
                f"  got inputs of shape {_shapes(inputs)} and targets of shape {_shapes(targets)}"
            )
        check_not_empty(count)
        self.inputs = inputs
        self.targets = map_tensors(_as_held, targets)
        self.labels = label_column(targets)
        self.client_ids = integer_column("client_ids", client_ids, count)

    def __len__(self) -> int:
        return num_examples(self.inputs)

    def fetch(self, ids: Tensor) -> tuple[Tree, Tree]:
        ids = to_device(ids, first_tensor(self.inputs).device)
        inputs, targets = (
            map_tensors(lambda tensor: tensor.index_select(0, ids), tree) for tree in (self.inputs, self.targets)
        )
        return inputs, as_targets(targets)

    @property
    def nbytes(self) -> int:
        return nbytes((self.inputs, self.targets))

    def to(self, device: torch.device) -> TensorSource:
        moved = copy(self)
        moved.inputs, moved.targets = to_device((self.inputs, self.targets), device)
        return moved

    def fingerprint_data(self) -> list[np.ndarray]:
        return [column for tree in (self.inputs, self.targets) for column in _content(tree)]


class SequenceWindows:
    """Source of token windows: the inputs are `length` tokens, the targets the same tokens shifted by one.

    Batches are int64 [B, length].

    Args:
        tokens: uint8 [N, length + 1], one row per window; may be a view with overlapping rows.
        length: tokens of a window.
        client_ids: natural client of every window, int64 [N].

    Raises:
        ValueError: there are no rows, their width is not length + 1, or the client ids are not N.
    """

    labels: np.ndarray | None = None

    def __init__(self, tokens: Tensor, length: int, client_ids: np.ndarray | None = None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] != length + 1:
            raise ValueError(
                f"windows of length={length} need rows of {length + 1} tokens; got shape {list(tokens.shape)}"
            )
        check_not_empty(len(tokens))
        self.tokens = tokens
        self.length = length
        self.client_ids = integer_column("client_ids", client_ids, len(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.tokens.index_select(0, to_device(ids, self.tokens.device))
        return rows[:, :-1].long(), rows[:, 1:].long()

    @property
    def targets(self) -> Tensor:
        """The targets of all windows."""
        return self.tokens[:, 1:]

    @property
    def nbytes(self) -> int:
        return self.tokens.untyped_storage().nbytes()

    def to(self, device: torch.device) -> SequenceWindows:
        # Move the storage, not the rows: overlapping rows then take no more memory than here.
        moved, tokens = copy(self), self.tokens
        storage = tokens.as_strided((self.nbytes // tokens.element_size(),), (1,), 0).to(device, copy=True)
        moved.tokens = storage.as_strided(tokens.shape, tokens.stride(), tokens.storage_offset())
        return moved

    def fingerprint_data(self) -> list[np.ndarray]:
        return [self.tokens.numpy()]


class DataSplits:
    """A training, a test and perhaps a validation source, with the names of their labels and natural clients.

    Args:
        train: a Source, or what `as_source` converts to one.
        test: likewise.
        classes: number of classes, or size of the vocabulary; None for other tasks.
        client_names: names of the natural clients, by id.
        label_names: names of the classes, by label.
        weights: weight of each training example in the loss, N finite numbers from 0; None for equal weights.
        text_format: of tokens: how text becomes tokens; None if that is not known.
        validation: like `test`; None if validation examples are taken from the training source.
        encoder: of the columns of a table, if the sources have one.
        agreement: of silos that have examples of their own; None: each has all.

    Attributes:
        token_bytes: bytes of each token, int64 [classes]; None if the examples are no tokens whose text is known.
        central: the test set of a coordinator, which it has itself; None elsewhere.
        has_central: whether the coordinator has one, on all members of a federation.
        validation: the source of validation examples, which may be that of training.
        has_validation: whether it is a source of its own.

    Raises:
        ValueError: the weights are invalid, or a source cannot be made.
    """

    def __init__(
        self,
        train: Source | Dataset[Any],
        test: Source | Dataset[Any],
        classes: int | None,
        client_names: tuple[str, ...] = (),
        label_names: tuple[str, ...] = (),
        weights: np.ndarray | None = None,
        text_format: TextFormat | None = None,
        validation: Source | Dataset[Any] | None = None,
        encoder: TableEncoder | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self.train, self.test = as_source(train, classes), as_source(test, classes)
        self.has_validation = validation is not None
        self.validation = self.train if validation is None else as_source(validation, classes)
        self.weights = validate_weights(weights, len(self.train))
        self.classes = classes
        self.client_names = client_names
        self.label_names = label_names
        self.text_format, self.token_bytes = text_format, text_format and text_format.token_bytes
        self.encoder = encoder
        self.agreement = agreement or Alone()
        self.central: Source | None = None
        self.has_central = False

    @property
    def parts(self) -> dict[str, Source]:
        """The sources by name: train, test, and validation if it is one of its own."""
        own = {"validation": self.validation} if self.has_validation else {}
        return {"train": self.train, "test": self.test, **own}

    def with_parts(self, train: Source, test: Source, validation: Source | None = None) -> DataSplits:
        """Return the data set with other sources, of as many examples."""
        splits = copy(self)
        splits.train, splits.test, splits.has_validation = train, test, validation is not None
        splits.validation = train if validation is None else validation
        return splits

    def without_validation(self) -> DataSplits:
        """Return the data set without a validation source of its own."""
        return self.with_parts(self.train, self.test)

    def encoded_by(self, encoder: TableEncoder) -> DataSplits:
        """Return the data set with another encoder of its sources, which are those of a table."""
        encoded: dict[str, Source] = {
            part: source.encoded_by(encoder)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
            for part, source in self.parts.items()
        }
        splits = self.with_parts(**encoded)
        splits.encoder = encoder
        return splits

    @property
    def homes(self) -> tuple[int, ...] | None:
        """Silo of every client, where each client brings its own files; None for pooled data."""
        return getattr(self.train, "homes", None)


def fetch_by_seed(source: Source, ids: Tensor, seed: int) -> tuple[Tree, Tree]:
    """Fetch examples; what the source draws at random for each, if anything, is a function of the seed."""
    fetch = getattr(source, "fetch_seeded", None)
    return source.fetch(ids) if fetch is None else fetch(ids, seed)


def fetch_seeded(source: Source, ids: Tensor, *tags: Tag) -> tuple[Tree, Tree]:
    """Fetch examples; what the source draws at random for each, if anything, is a function of the tags."""
    return fetch_by_seed(source, ids, derive_seed(*tags))


def as_source(dataset: object, classes: int | None = None) -> Source:
    """Convert a data set to a Source.

    Args:
        dataset: a Source (returned unchanged), a TensorDataset of two tensors, a map-style Dataset, or an
            IterableDataset that is a `SeekableDataset`.
        classes: number of classes; None for targets that are no labels.

    Raises:
        ValueError: it is anything else.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, Source):
        return dataset
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return TensorSource(*dataset.tensors)
    if isinstance(dataset, Dataset) and isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset):
        return MapDatasetSource(dataset, classes=classes)
    if isinstance(dataset, IterableDataset) and isinstance(dataset, SeekableDataset):
        return IterableSource(dataset, classes)
    raise ValueError(
        f"not a data set: got {kind}.\n"
        "  valid: a Source (__len__, fetch, labels, client_ids), a TensorDataset of two tensors,\n"
        "  or a map-style torch Dataset (__len__, __getitem__) of (input, target) pairs.\n"
        "  An IterableDataset needs __len__() and examples(start), an iterator from that example on:\n"
        "  without them its examples have no numbers, by which they are partitioned and found after a restart"
    )


def _as_held(targets: Tensor) -> Tensor:
    return as_targets(targets) if targets.ndim == 1 else targets  # larger ones are converted when they are fetched


def _shapes(tree: Tree) -> str:
    """Describe the shapes of tensors."""
    return ", ".join(f"{name} {list(tensor.shape)}".strip() for name, tensor in named_tensors(tree).items())


def _content(tree: Tree) -> list[np.ndarray]:
    """Return the numbers of a tree for a checksum, and if it is more than a tensor, the names."""
    named = named_tensors(tree)
    names = [np.array(list(named))] if "" not in named else []
    return [*names, *(tensor.numpy() for tensor in named.values())]
