"""Clients whose examples lie in files of their own: only a client's silo opens its file, the others are told of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trainer.data import DataSplits, PerClientSource, Source, checksum
from trainer.data.partition.allocation import even_groups
from trainer.distributed import collectives
from trainer.distributed.topology import Topology

MAX_NAMED = 3  # files, in a message


@dataclass(frozen=True)
class DatasetInfo:
    """What all ranks are told of a client's data: numbers of examples, their kinds, and what tells them from others."""

    train: int
    test: int
    inputs: str
    targets: str
    classes: int | None
    label_names: list[str]
    checksum: int
    has_weights: bool

    @staticmethod
    def of(splits: DataSplits) -> DatasetInfo:
        inputs, targets = (_describe_tensor(tensor) for tensor in splits.train.fetch(torch.arange(1)))
        names = list(splits.label_names)
        sizes, told = (len(splits.train), len(splits.test)), checksum(splits)
        return DatasetInfo(*sizes, inputs, targets, splits.classes, names, told, splits.weights is not None)


def load_silo_files(files: Sequence[str], read: Callable[[str], DataSplits], topology: Topology) -> DataSplits:
    """The data set of clients with a file each, which `read` opens in the client's silo alone. A collective.

    The first silo is the home of the first files, and so on; their numbers differ by one at most. Of a world that is
    not there (see plan) all files are read. Raises ValueError, on all ranks alike, with all that is wrong with the
    files, and when their examples are of different kinds.
    """
    homes = even_groups(len(files), topology.num_silos).tolist()
    is_real = topology.silo_group is not None
    mine = [client for client, home in enumerate(homes) if home == topology.silo or not is_real]
    here, errors = {}, []
    for client in mine:
        try:
            here[client] = read(files[client])
        except ValueError as error:
            errors.append(str(error))
    facts = _gather_info({client: DatasetInfo.of(splits) for client, splits in here.items()}, errors)
    if different := _differences(files, facts):
        raise ValueError(different)

    def joined(part: str) -> Source:
        sizes = [getattr(each, part) for each in facts]
        return PerClientSource(
            sizes, {c: getattr(here[c], part) for c in here}, homes, [each.checksum for each in facts]
        )

    classes = max((each.classes for each in facts if each.classes is not None), default=None)
    train, names = joined("train"), tuple(facts[0].label_names)
    weights = _weights(here, len(train)) if any(each.has_weights for each in facts) else None
    return DataSplits(train, joined("test"), classes, label_names=names, weights=weights)


def _weights(local: Mapping[int, DataSplits], examples: int) -> np.ndarray:
    """What each example counts, float32 [N]: those that are here are numbered first, those that are not count 1."""
    weights, first = np.ones(examples, np.float32), 0
    for splits in local.values():
        last = first + len(splits.train)
        if splits.weights is not None:
            weights[first:last] = splits.weights
        first = last
    return weights


def _describe_tensor(examples: torch.Tensor) -> str:
    return f"{str(examples.dtype).removeprefix('torch.')} {list(examples.shape[1:])}"


def _gather_info(local: dict[int, DatasetInfo], errors: list[str]) -> list[DatasetInfo]:
    """The facts of all clients, in order, from the ranks that have them; ValueError with the faults of all."""
    texts = collectives.all_gather_texts(
        json.dumps([errors, {client: asdict(facts) for client, facts in local.items()}])
    )
    told: list[tuple[list[str], dict[str, Any]]] = [json.loads(text) for text in dict.fromkeys(texts)]
    if found := list(dict.fromkeys(fault for errors, _ in told for fault in errors)):
        raise ValueError("\n".join(found))
    facts = {int(client): DatasetInfo(**each) for _, clients in told for client, each in clients.items()}
    return [facts[client] for client in sorted(facts)]


def _differences(files: Sequence[str], facts: Sequence[DatasetInfo]) -> str:
    """What is said of files whose examples cannot be trained on together."""
    lines = []
    for what in ("inputs", "targets", "label_names"):
        first, *kinds = (getattr(each, what) for each in facts)
        others = [f"{file} {kind}" for file, kind in zip(files[1:], kinds, strict=True) if kind != first]
        if others:
            lines.append(f"{what}: {files[0]} has {first}, but {', '.join(others[:MAX_NAMED])}")
    if any(line.startswith("label_names") for line in lines):
        lines.append("set data.classes= to the names of all, such as [cat,dog]")
    return "\n  ".join(["data.files: the files hold different kinds of examples.", *lines]) if lines else ""
