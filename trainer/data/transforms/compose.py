"""Transforms one after the other: all of them for training, for evaluation those that are not random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trainer.data import PerClientSource, Source
from trainer.data.transforms.base import Batch, Examples, Transform, random_key
from trainer.data.transforms.normalization import Standardise
from trainer.utils.hardware import to_device

FIT_BATCH_SIZE = 1024  # examples at a time


@dataclass(frozen=True)
class Compose:
    """Transforms by name, in their order; the name tells their randomness apart.

    channels_last  whether images [B, C, H, W] are laid out in memory pixel by pixel: the same numbers in another order
    """

    transforms: Mapping[str, Transform] = field(default_factory=dict)
    classes: int | None = None
    channels_last: bool = False

    @property
    def needs_fitting(self) -> bool:
        """Whether something has to be measured before it can be used."""
        return any(isinstance(each, Standardise) for each in self.transforms.values())

    def for_training(
        self, source: Source, ids: Tensor, members: Tensor, seed: int, epoch: int, device: torch.device
    ) -> Examples:
        """The examples `ids` of a client that has these `members`, as they are trained on in this epoch."""
        return self._with_memory_format(
            self._apply_for_training(list(self.transforms), source, ids, members, seed, epoch, device)
        )

    def for_evaluation(self, examples: Examples, device: torch.device) -> Examples:
        """The examples as they are evaluated, on this device."""
        return self._with_memory_format(self._apply_for_evaluation(list(self.transforms), _to_device(examples, device)))

    def fit(self, source: Source, ids: Tensor, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Makes ready what goes by the training set, of which the examples `ids` are this rank's.

        Only sums leave a silo, and `total` adds them up over all ranks: the outcome is that of the pooled examples.
        """
        names = list(self.transforms)
        for place, name in enumerate(names):
            transform = self.transforms[name]
            if isinstance(transform, Standardise) and not transform.is_fitted:
                fetched = (_to_device(source.fetch(some), device) for some in ids.split(FIT_BATCH_SIZE))
                transform.fit((self._apply_for_evaluation(names[:place], examples)[0] for examples in fetched), total)

    def errors(self, inputs: Tensor, targets: Tensor) -> list[str]:
        """Why these examples cannot be taken, of each transform that cannot."""
        said = {name: each.mismatch(inputs, targets, self.classes) for name, each in self.transforms.items()}
        errors = [f"transforms.{name}: {fault}" for name, fault in said.items() if fault]
        if self.channels_last and inputs.dim() != 4:
            fault = f"channels_last=true, but inputs of shape {list(inputs.shape[1:])} are no images [C, height, width]"
            errors.append(f"{fault}\n  set channels_last=false")
        return errors

    def _with_memory_format(self, examples: Examples) -> Examples:
        inputs, targets = examples
        return (inputs.contiguous(memory_format=torch.channels_last), targets) if self.channels_last else examples

    def _apply_for_training(
        self,
        names: list[str],
        source: Source,
        ids: Tensor,
        members: Tensor,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> Examples:
        examples = _to_device(source.fetch(ids), device)
        if not names:
            return examples
        numbers = source.global_positions(ids) if isinstance(source, PerClientSource) else ids
        batch = Batch(*examples, numbers, members, 0, _no_other_examples, self.classes)
        for place, name in enumerate(names):
            before = names[:place]

            def fetch(others: Tensor, before: list[str] = before) -> Examples:
                return self._apply_for_training(before, source, others, members, seed, epoch, device)

            batch = replace(batch, key=random_key(seed, epoch, name), fetch=fetch)
            inputs, targets = self.transforms[name](batch)
            batch = replace(batch, inputs=inputs, targets=targets)
        return batch.inputs, batch.targets

    def _apply_for_evaluation(self, names: list[str], examples: Examples) -> Examples:
        none = torch.empty(0, dtype=torch.int64)
        for transform in (self.transforms[name] for name in names):
            if not transform.is_random:
                examples = transform(Batch(*examples, none, none, 0, _no_other_examples, self.classes))
        return examples


def _no_other_examples(others: Tensor) -> Examples:
    raise AssertionError("only what is random asks for other examples")


def _to_device(examples: Examples, device: torch.device) -> Examples:
    inputs, targets = examples
    return to_device(inputs, device), to_device(targets, device)
