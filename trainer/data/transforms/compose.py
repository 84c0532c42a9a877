"""Compose transforms: all of them for training, those that are not random for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trainer.data.sources.base import Source, fetch_by_seed
from trainer.data.sources.per_client import PerClientSource
from trainer.data.transforms.base import Batch, Examples, FittedTransform, Transform, random_key
from trainer.utils.hardware import to_device
from trainer.utils.seeding import derive_seed
from trainer.utils.tensor_trees import Tree, describe, named_tensors, select, with_tensor

FIT_BATCH_SIZE = 1024  # examples


@dataclass(frozen=True)
class Compose:
    """Transforms by name, in order. Two of the same class draw different numbers, as their names differ.

    Attributes:
        transforms: by name.
        classes: number of classes of the data set; None if it has none.
        channels_last: whether images [B, C, H, W] get torch's channels_last memory format; the values are the same.
        keys: by transform, the name of the tensor that it changes, where inputs are a dict, tuple or list.
        is_fitted: whether those with statistics of the training set have them.
    """

    transforms: Mapping[str, Transform] = field(default_factory=dict)
    classes: int | None = None
    channels_last: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    is_fitted: bool = False

    @property
    def needs_fitting(self) -> bool:
        """Whether some need statistics of the training set, and `fit` has to be called."""
        return bool(self._fitted_transforms) and not self.is_fitted

    @property
    def _fitted_transforms(self) -> dict[str, FittedTransform]:
        return {name: each for name, each in self.transforms.items() if isinstance(each, FittedTransform)}

    def for_training(
        self,
        source: Source,
        ids: Tensor,
        members: Tensor,
        seed: int,
        epoch: int,
        device: torch.device,
        examples: Examples | None = None,
    ) -> Examples:
        """Transform the examples `ids` of a client, whose examples are `members`, for an epoch.

        `examples` are those of `ids`, if they have been fetched, by a seed of `example_seed`.
        """
        examples = fetch_by_seed(source, ids, example_seed(seed, epoch)) if examples is None else examples
        names = list(self.transforms)
        return self._with_memory_format(
            self._apply_for_training(names, examples, source, ids, members, seed, epoch, device)
        )

    def for_evaluation(self, examples: Examples, device: torch.device) -> Examples:
        """Return the examples on the device, transformed for evaluation."""
        return self._with_memory_format(self._apply_for_evaluation(list(self.transforms), _to_device(examples, device)))

    def fit(self, source: Source, ids: Tensor, total: Callable[[Tensor], Tensor], device: torch.device) -> Compose:
        """Return the same transforms, fitted if they have statistics of the training set. All ranks must call it.

        Only sums leave a silo. The result is that of the pooled examples.

        Args:
            source: the training source.
            ids: this rank's examples.
            total: sums a tensor over all ranks.
            device: where to compute.
        """
        fitted = replace(self, transforms={}, is_fitted=True)
        for name, transform in self.transforms.items():
            if isinstance(transform, FittedTransform):
                transform = copy(transform)
                fetched = (source.fetch(some) for some in ids.split(FIT_BATCH_SIZE))
                before = replace(fitted, channels_last=False)
                batches = (before.for_evaluation(examples, device)[0] for examples in fetched)
                transform.fit((select(inputs, self._key(name)) for inputs in batches), total)
            fitted = replace(fitted, transforms={**fitted.transforms, name: transform})
        return fitted

    def state_dict(self) -> dict[str, Tensor]:
        """Return the statistics of the fitted transforms, on the CPU, by `<transform>.<statistic>`."""
        return {
            f"{name}.{key}": statistic.cpu()
            for name, transform in self._fitted_transforms.items()
            for key, statistic in transform.state_dict().items()
        }

    def with_state(self, state: Mapping[str, Tensor]) -> Compose:
        """Return the same transforms with the statistics of a `state_dict`.

        Raises:
            ValueError: there are none of a transform that needs them.
        """
        fitted = {name: copy(transform) for name, transform in self._fitted_transforms.items()}
        for name, transform in fitted.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            try:
                transform.load_state_dict(own)
            except KeyError as error:
                raise ValueError(
                    f"transforms.{name}: no {error} among the statistics that were saved.\n"
                    "  its run has not begun to train, or is of an older version: train it again"
                ) from error
        return replace(self, transforms={**self.transforms, **fitted}, is_fitted=True)

    def errors(self, inputs: Tree, targets: Tree, padded: Collection[str] = ()) -> list[str]:
        """Return an error for each transform that cannot be applied to examples like these.

        Args:
            inputs: of at least one example.
            targets: of the same.
            padded: names of inputs that are as wide as the longest example of their batch.
        """
        mismatches = {name: self._mismatch(name, inputs, targets, padded) for name in self.transforms}
        errors = [f"transforms.{name}{mismatch}" for name, mismatch in mismatches.items() if mismatch]
        if self.channels_last and not (isinstance(inputs, Tensor) and inputs.dim() == 4):
            errors.append(
                f"channels_last=true, but inputs of shape {describe(inputs)} are not images [C, H, W]\n"
                "  set channels_last=false"
            )
        return errors

    def _mismatch(self, name: str, inputs: Tree, targets: Tree, padded: Collection[str]) -> str:
        """Return why a transform cannot be applied, to be appended to its name; empty if it can."""
        key, names, transform = self._key(name), named_tensors(inputs), self.transforms[name]
        if key not in names:
            given = f".key={key}: there are no such inputs" if key else ": it changes a single tensor"
            if "" in names:
                return f"{given}, and the inputs are a tensor without a name\n  leave the key out"
            return f"{given}; the inputs have {', '.join(names)}\n  set transforms.{name}.key to one of them"
        if hasattr(transform, "fit") and name not in self._fitted_transforms:
            return ": what it fits needs state_dict and load_state_dict, with which the run folder keeps it"
        if key in padded and transform.is_random:
            return f".key={key}: its examples have different lengths, and the random numbers of a batch one shape"
        if not isinstance(targets, Tensor):
            return ": it takes targets that are one tensor"
        mismatch = transform.mismatch(names[key], targets, self.classes)
        return mismatch and f": {mismatch}"

    def _key(self, name: str) -> str:
        return self.keys.get(name, "")

    def _with_memory_format(self, examples: Examples) -> Examples:
        inputs, targets = examples
        return (inputs.contiguous(memory_format=torch.channels_last), targets) if self.channels_last else examples

    def _apply_for_training(
        self,
        names: list[str],
        examples: Examples,
        source: Source,
        ids: Tensor,
        members: Tensor,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> Examples:
        examples = _to_device(examples, device)
        if not names:
            return examples
        numbers = source.global_positions(ids) if isinstance(source, PerClientSource) else ids
        batch = Batch(*examples, numbers, members, 0, _no_other_examples, self.classes)
        for index, name in enumerate(names):
            before = names[:index]

            def fetch(others: Tensor, before: list[str] = before) -> Examples:
                fetched = fetch_by_seed(source, others, example_seed(seed, epoch))
                return self._apply_for_training(before, fetched, source, others, members, seed, epoch, device)

            batch = replace(batch, key=random_key(seed, epoch, name), fetch=fetch)
            inputs, targets = self._apply(name, batch)
            batch = replace(batch, inputs=inputs, targets=targets)
        return batch.inputs, batch.targets

    def _apply(self, name: str, batch: Batch) -> Examples:
        """Apply a transform to the inputs that it changes."""
        transform, key = self.transforms[name], self._key(name)
        if not key:
            return transform(batch)

        def fetch(others: Tensor) -> Examples:
            inputs, targets = batch.fetch(others)
            return select(inputs, key), targets

        changed, targets = transform(replace(batch, inputs=select(batch.inputs, key), fetch=fetch))
        return with_tensor(batch.inputs, key, changed), targets

    def _apply_for_evaluation(self, names: list[str], examples: Examples) -> Examples:
        none = torch.empty(0, dtype=torch.int64)
        for name in names:
            if not self.transforms[name].is_random:
                examples = self._apply(name, Batch(*examples, none, none, 0, _no_other_examples, self.classes))
        return examples


def example_seed(seed: int, epoch: int) -> int:
    """Return the seed of what a source draws at random for its examples in an epoch of a run."""
    return derive_seed(seed, "examples", epoch)


def _no_other_examples(others: Tensor) -> Examples:
    raise AssertionError("only random transforms fetch other examples")


def _to_device(examples: Examples, device: torch.device) -> Examples:
    inputs, targets = examples
    return to_device(inputs, device), to_device(targets, device)
