"""Weights of examples from their own weights and those of their classes, and weights of clients from both."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.example_weights import ExampleWeights
from trainer.data.sources.per_client import PerClientSource
from trainer.tasks import Task

MAX_NAMED = 5  # clients named in a message


def apply_class_weights(task: Task, splits: DataSplits, clients: Clients) -> ExampleWeights | None:
    """Return w_i = e_i c(y_i), of the data's weights e and the task's class weights c; None if there are neither.

    With per-client files this is a collective. A silo then contributes the number of its examples of each class, summed
    over its clients, and each client's sum of weights.

    Raises:
        ValueError: on all ranks alike, if the class weights do not fit the classes, the data has no labels, all
            examples of a client weigh 0, or the task does not take weights.
    """
    class_weights = getattr(task, "class_weights", None)
    if splits.weights is None and class_weights is None:
        return None
    if "weights" not in signature(task.loss_sum).parameters:
        raise ValueError(
            f"task={type(task).__name__} takes no weights, and the examples have weights.\n"
            "  define loss_sum(self, outputs, targets, weights=None), or train without data.weights"
        )
    local_clients = splits.train.local if isinstance(splits.train, PerClientSource) else range(len(clients))
    ids = {client: torch.from_numpy(clients.train[client]) for client in local_clients}
    examples = torch.ones(len(splits.train)) if splits.weights is None else torch.from_numpy(splits.weights)
    if class_weights is not None:
        labels = _labels(splits.train)
        own = _counts(labels, list(ids.values()), splits.classes)
        counts = torch.from_numpy(splits.agreement.total("weights-classes", own.numpy()))
        examples = examples * _weight_by_class(class_weights, counts)[labels]
    sums = torch.zeros(len(clients), dtype=torch.float64)
    for client, client_ids in ids.items():
        sums[client] = examples[client_ids].sum(dtype=torch.float64)
    weights = splits.agreement.total("weights-clients", sums.numpy()).tolist()
    _check_weightless([client for client, weight in enumerate(weights) if weight == 0])
    return ExampleWeights(examples, tuple(weights))


def _labels(train: Source) -> Tensor:
    """Return the label of every example, int64 [N]; -1 for examples without one, or in another silo."""
    labels, first = torch.full((len(train),), -1), 0
    # Local examples have the first ids.
    for source in train.local.values() if isinstance(train, PerClientSource) else [train]:
        if source.labels is not None:
            labels[first : first + len(source)] = torch.from_numpy(source.labels)
        first += len(source)
    return labels


def _counts(labels: Tensor, ids: Sequence[Tensor], classes: int | None) -> Tensor:
    """Count the examples without a label, and those of each class: int64 [1 + classes]."""
    bins = 1 + (classes or 0)
    return sum(
        (torch.bincount(labels[part] + 1, minlength=bins) for part in ids), start=torch.zeros(bins, dtype=torch.int64)
    )


def _weight_by_class(class_weights: list[float] | str, counts: Tensor) -> Tensor:
    """Return the weight of each class, float32 [classes]; balanced is N / (K n_c) over the K classes that occur."""
    unlabelled, examples = int(counts[0]), counts[1:]
    if unlabelled or not len(examples):
        raise ValueError(
            "task.class_weights: this data has no labels, one class per example.\n"
            "  set task.class_weights=null, or give the training source labels"
        )
    if not isinstance(class_weights, str):
        if len(class_weights) != len(examples):
            raise ValueError(
                f"task.class_weights: {len(class_weights)} weights for {len(examples)} classes\n"
                f"  valid: {len(examples)} numbers, balanced, or null"
            )
        return torch.tensor(class_weights, dtype=torch.float32)
    occurs = examples > 0
    return torch.where(occurs, examples.sum() / (occurs.sum() * examples.clamp(min=1)), 0.0)


def _check_weightless(clients: list[int]) -> None:
    if clients:
        names = ", ".join(map(str, clients[:MAX_NAMED])) + (" and others" if len(clients) > MAX_NAMED else "")
        raise ValueError(
            f"the training examples of {len(clients)} clients all weigh 0: {names}.\n"
            "  leave these examples out, set another partition=, or train without data.weights and task.class_weights"
        )
