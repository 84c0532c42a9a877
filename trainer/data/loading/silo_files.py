"""Load per-client files: a silo opens the files of its clients, and shares a description of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.loading.fingerprint import checksum
from trainer.data.partition.allocation import even_groups
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.per_client import MadeUpSource, PerClientSource
from trainer.data.sources.table import TableEncoder, fit_encoder
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.utils.annotations import Count
from trainer.utils.tensor_trees import Tree, named_tensors

MAX_NAMED = 3  # files named in a message


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a client's data that all ranks receive.

    Attributes:
        train: number of training examples.
        test: number of test examples.
        validation: number of validation examples; None if they are taken from the training examples.
        inputs: dtype and shape of an example's input.
        targets: dtype and shape of an example's target.
        classes: number of classes; None if there are none.
        label_names: names of the classes.
        checksum: checksum of all examples.
        has_weights: whether the examples have weights.
    """

    train: Count
    test: Count
    validation: Count | None
    inputs: str
    targets: str
    classes: Count | None
    label_names: list[str]
    checksum: int
    has_weights: bool

    @staticmethod
    def of(splits: DataSplits) -> DatasetInfo:
        inputs, targets = describe_example(splits.train)
        return DatasetInfo(
            train=len(splits.train),
            test=len(splits.test),
            validation=len(splits.validation) if splits.has_validation else None,
            inputs=inputs,
            targets=targets,
            classes=splits.classes,
            label_names=list(splits.label_names),
            checksum=checksum(splits),
            has_weights=splits.weights is not None,
        )


def load_silo_files(
    files: Sequence[str],
    read: Callable[[str], DataSplits],
    topology: Topology,
    encoder: TableEncoder | None = None,
) -> DataSplits:
    """Load the data set of clients with a file each; a collective.

    The first silo gets the first files, and so on; their numbers differ by at most one. Only the ranks of a client's
    silo open its file. A topology without process groups, as `plan` has it, loads all files.

    Args:
        files: path of every client's file.
        read: reads a file.
        topology: decides which files are local.
        encoder: of the columns of tables; None: that of the training examples of all silos.

    Raises:
        ValueError: on all ranks alike, lists every problem with any file, or differing kinds of examples.
    """
    homes = even_groups(len(files), topology.num_silos).tolist()
    has_groups = topology.silo_group is not None
    local, errors = {}, []
    for client in [client for client, home in enumerate(homes) if home == topology.silo or not has_groups]:
        try:
            local[client] = read(files[client])
        except ValueError as error:
            errors.append(str(error))
    if encoder is None:
        local = _agree_on_columns(local, errors, topology)
    infos = _gather_info({client: DatasetInfo.of(splits) for client, splits in local.items()}, errors, topology)
    return join_clients(files, homes, local, infos)


def join_clients(
    names: Sequence[str], homes: Sequence[int], local: Mapping[int, DataSplits], infos: Sequence[DatasetInfo]
) -> DataSplits:
    """Return the data set of clients that bring their own, of which this rank has some.

    Args:
        names: what each brings, for errors.
        homes: silo of every client.
        local: the data of the clients of this rank's silo. Without any, examples are made up.
        infos: the description of what each brings.

    Raises:
        ValueError: they bring examples of differing kinds.
    """
    if error := _kind_error(names, infos):
        raise ValueError(error)

    def join(part: str) -> Source:
        sizes, sources = [getattr(info, part) for info in infos], {c: getattr(local[c], part) for c in local}
        made_up = None if local else MadeUpSource(infos[0].inputs, infos[0].targets)
        return PerClientSource(sizes, sources, homes, [info.checksum for info in infos], made_up)

    classes = max((info.classes for info in infos if info.classes is not None), default=None)
    train, label_names = join("train"), tuple(infos[0].label_names)
    weights = _join_weights(local, len(train)) if any(info.has_weights for info in infos) else None
    validation = None if infos[0].validation is None else join("validation")
    one = next(iter(local.values()), None)
    of_all = {"text_format": one.text_format, "encoder": one.encoder} if one else {}
    return DataSplits(
        train, join("test"), classes, weights=weights, validation=validation, label_names=label_names, **of_all
    )


def _agree_on_columns(local: dict[int, DataSplits], errors: Sequence[str], topology: Topology) -> dict[int, DataSplits]:
    """Return the data sets with the encoder of the training examples of all silos, if they are columns of tables."""
    is_ready = not errors and all(splits.encoder is not None for splits in local.values())
    if not all(map(json.loads, _gather(json.dumps(is_ready), topology))):
        return local  # they are not of tables, or there are errors, which are raised next
    encoder = fit_encoder([splits.train for splits in local.values()], _BetweenSilos(topology))
    return {client: splits.encoded_by(encoder) for client, splits in local.items()}


@dataclass(frozen=True)
class _BetweenSilos:
    """The exchange of silos, of which each leader contributes. Without process groups all files are here."""

    topology: Topology

    def union(self, sets: list[list[str]]) -> list[list[str]]:
        sent = sets if self.topology.is_leader else [[] for _ in sets]
        gathered = map(json.loads, dict.fromkeys(_gather(json.dumps(sent), self.topology)))
        return [sorted(set().union(*column)) for column in zip(*gathered, strict=True)]

    def total(self, sums: np.ndarray) -> np.ndarray:
        if self.topology.silo_group is None:
            return sums
        sent = torch.from_numpy(sums if self.topology.is_leader else np.zeros_like(sums))
        return collectives.all_reduce_sum(sent).numpy()


def _join_weights(local: Mapping[int, DataSplits], examples: int) -> np.ndarray:
    """Return the weights of the local examples, which have the first ids, and 1 for others: float32 [N]."""
    weights, first = np.ones(examples, np.float32), 0
    for splits in local.values():
        last = first + len(splits.train)
        if splits.weights is not None:
            weights[first:last] = splits.weights
        first = last
    return weights


def describe_example(source: Source) -> tuple[str, str]:
    """Describe the dtypes and shapes of the inputs and targets of an example; padded tensors are of any length."""
    (inputs, targets), padding = source.fetch(torch.arange(1)), getattr(source, "padding", None)
    return (
        _describe_types(inputs, padding.padded_inputs if padding else ()),
        _describe_types(targets, padding.padded_targets if padding else ()),
    )


def _describe_types(examples: Tree, padded: Collection[str]) -> str:
    """Describe the dtype and the shape of an example, of each tensor by its name; of padded ones any length."""
    descriptions: list[str] = []
    for name, tensor in named_tensors(examples).items():
        shape = ["any" if name in padded else tensor.shape[1], *tensor.shape[2:]] if tensor.dim() > 1 else []
        descriptions.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}".strip())
    return ", ".join(descriptions)


def _gather(text: str, topology: Topology) -> list[str]:
    """Gather the texts of all ranks. Without process groups each has all files, and needs no others' texts."""
    return [text] if topology.silo_group is None else collectives.all_gather_texts(text)


def _gather_info(local: dict[int, DatasetInfo], errors: list[str], topology: Topology) -> list[DatasetInfo]:
    """Gather the descriptions of all clients, in order; raise ValueError with the errors of all ranks."""
    texts = _gather(json.dumps([errors, {client: asdict(info) for client, info in local.items()}]), topology)
    # Replicas of a silo send the same text.
    gathered: list[tuple[list[str], dict[str, Any]]] = [json.loads(text) for text in dict.fromkeys(texts)]
    if all_errors := list(dict.fromkeys(error for errors, _ in gathered for error in errors)):
        raise ValueError("\n".join(all_errors))
    infos = {int(client): DatasetInfo(**fields) for _, clients in gathered for client, fields in clients.items()}
    return [infos[client] for client in sorted(infos)]


def _kind_error(files: Sequence[str], infos: Sequence[DatasetInfo]) -> str:
    """Return an error for files whose examples cannot be trained on together, empty if there are none."""
    lines = []
    for field in ("inputs", "targets", "label_names"):
        first, *kinds = (getattr(info, field) for info in infos)
        others = [f"{file} {kind}" for file, kind in zip(files[1:], kinds, strict=True) if kind != first]
        if others:
            lines.append(f"{field}: {files[0]} has {first}, but {', '.join(others[:MAX_NAMED])}")
    without = [file for file, info in zip(files, infos, strict=True) if info.validation is None]
    if 0 < len(without) < len(files):
        lines.append(f"validation: {', '.join(without[:MAX_NAMED])} without validation examples, and others have some")
        lines.append("set data.validation=0.1, to take them from the training examples of all")
    if any(line.startswith("label_names") for line in lines):
        lines.append("set data.classes= to the names of all classes, such as [cat,dog]")
    return "\n  ".join(["data.files: the files hold different kinds of examples.", *lines]) if lines else ""
