"""What each training example counts, by its own weight and by that of its class; and so what each client counts."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor

from trainer.data import Clients, DataSplits, ExampleWeights, PerClientSource, Source
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.tasks import Classification, Task

MAX_NAMED = 5  # clients, in a message


def apply_class_weights(task: Task, splits: DataSplits, clients: Clients, topology: Topology) -> ExampleWeights | None:
    """w_i = e_i c(y_i), of the data's weights e and the task's class weights c; None where there are neither.

    Where examples lie apart this is a collective, and what leaves a silo are the numbers of its examples of each class,
    added up, and its clients' sums of weights. Raises ValueError, on all ranks alike, for class weights that do not fit
    the classes, for data without labels, for clients whose examples all weigh 0, and for a task that takes no weights.
    """
    class_weights = task.class_weights if isinstance(task, Classification) else None
    if splits.weights is None and class_weights is None:
        return None
    if "weights" not in signature(task.loss_sum).parameters:
        raise ValueError(
            f"task={type(task).__name__} takes no weights, and the examples have some.\n"
            "  write its loss_sum(self, outputs, targets, weights=None), or train without data.weights"
        )
    here = list(splits.train.local) if isinstance(splits.train, PerClientSource) else range(len(clients))
    ids = {client: torch.from_numpy(clients.train[client]) for client in here}
    examples = torch.ones(len(splits.train)) if splits.weights is None else torch.from_numpy(splits.weights)
    if class_weights is not None:
        labels = _labels(splits.train)
        counts = _sum_over_silos(_counts(labels, list(ids.values()), splits.classes), splits, topology)
        examples = examples * _class_weights(class_weights, counts)[labels]
    sums = torch.zeros(len(clients), dtype=torch.float64)
    for client, own in ids.items():
        sums[client] = examples[own].sum(dtype=torch.float64)
    weights = _sum_over_silos(sums, splits, topology).tolist()
    _check_idle_clients([client for client, weight in enumerate(weights) if weight == 0])
    return ExampleWeights(examples, tuple(weights))


def _labels(train: Source) -> Tensor:
    """The label of every example, int64 [N]; -1 of one that has none, or is not here."""
    labels, first = torch.full((len(train),), -1), 0
    for source in train.local.values() if isinstance(train, PerClientSource) else [train]:  # these are numbered first
        if source.labels is not None:
            labels[first : first + len(source)] = torch.from_numpy(source.labels)
        first += len(source)
    return labels


def _counts(labels: Tensor, ids: list[Tensor], classes: int | None) -> Tensor:
    """How many of these examples have no label, and how many each class: int64 [1 + classes]."""
    return sum((torch.bincount(labels[own] + 1, minlength=1 + (classes or 0)) for own in ids), start=torch.tensor(0))


def _sum_over_silos(part: Tensor, splits: DataSplits, topology: Topology) -> Tensor:
    """The sum over the silos, where each has examples of its own and they are there."""
    if not isinstance(splits.train, PerClientSource) or topology.silo_group is None:
        return part
    return collectives.all_reduce_sum(part if topology.is_leader else torch.zeros_like(part))


def _class_weights(class_weights: list[float] | str, counts: Tensor) -> Tensor:
    """The weight of each class, float32 [classes]; of balanced ones N / (K n_c), for the K classes that occur."""
    unlabelled, examples = int(counts[0]), counts[1:]
    if unlabelled or not len(examples):
        raise ValueError(
            "task.class_weights with data that has no labels, one of so many classes an example.\n"
            "  set task.class_weights=null, or give the training source labels"
        )
    if not isinstance(class_weights, str):
        if len(class_weights) != len(examples):
            raise ValueError(
                f"task.class_weights: {len(class_weights)} of them for {len(examples)} classes\n"
                f"  valid: {len(examples)} numbers, balanced, or null"
            )
        return torch.tensor(class_weights, dtype=torch.float32)
    there = examples > 0
    return torch.where(there, examples.sum() / (there.sum() * examples.clamp(min=1)), 0.0)


def _check_idle_clients(clients: list[int]) -> None:
    if clients:
        named = ", ".join(map(str, clients[:MAX_NAMED])) + (" and others" if len(clients) > MAX_NAMED else "")
        raise ValueError(
            f"the training examples of {len(clients)} clients all weigh 0: {named}.\n"
            "  leave these examples out, deal them otherwise, or train without data.weights and task.class_weights"
        )
