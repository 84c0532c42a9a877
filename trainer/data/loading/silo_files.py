"""Data of clients that bring their own: a silo reads that of its clients, and shares a description of each."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from trainer.data.loading.fingerprint import checksum
from trainer.data.partition.allocation import even_groups
from trainer.data.sources.agreement import Agreement, Alone, BetweenSilos
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.joined import JoinedSource
from trainer.data.sources.per_client import ANY, MadeUpSource, PerClientSource
from trainer.data.sources.table import TableEncoder, TableStatistics, table_rows
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.utils.annotations import Count
from trainer.utils.errors import raise_errors
from trainer.utils.tensor_trees import Tree, named_tensors

MAX_NAMED = 3  # files named in a message


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a client's data that all ranks receive.

    Attributes:
        train: number of training examples.
        test: number of test examples.
        validation: number of validation examples; None if they are taken from the training examples.
        inputs: dtype and shape of an example's input, before columns of tables are encoded.
        targets: dtype and shape of an example's target.
        classes: number of classes; None if there are none.
        label_names: names of the classes.
        checksum: checksum of all examples.
        has_weights: whether the examples have weights.
        columns: of tables, which are encoded by statistics of all clients; None: there is nothing to encode.
        token_sizes: checksum of the bytes of each token; None if the examples are no tokens whose text is known.
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
    columns: TableStatistics | None = None
    token_sizes: int | None = None

    @staticmethod
    def of(splits: DataSplits) -> DatasetInfo:
        inputs, targets = describe_example(splits.train)
        columns: TableStatistics | None = getattr(splits.train, "statistics", None)
        return DatasetInfo(
            train=len(splits.train),
            test=len(splits.test),
            validation=len(splits.validation) if splits.has_validation else None,
            inputs=inputs if columns is None else str(columns),
            targets=targets,
            classes=splits.classes,
            label_names=list(splits.label_names),
            token_sizes=None if splits.token_bytes is None else zlib.crc32(splits.token_bytes.tobytes()),
            checksum=checksum(splits),
            has_weights=splits.weights is not None,
            columns=columns,
        )

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> DatasetInfo:
        """Return the description that `asdict` has made this tree of.

        Raises:
            ValueError: it is something else.
        """
        try:
            return TypeAdapter(DatasetInfo).validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            raise ValueError(f"it describes no data: {error.errors()[0]['msg']}") from error


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
    infos = _gather_info({client: DatasetInfo.of(splits) for client, splits in local.items()}, errors, has_groups)
    agreement = BetweenSilos(topology) if has_groups else Alone()
    return join_clients("data.files: the files", files, homes, local, infos, agreement, encoder)


def join_clients(
    owners: str,
    names: Sequence[str],
    homes: Sequence[int],
    local: Mapping[int, DataSplits],
    infos: Sequence[DatasetInfo],
    agreement: Agreement,
    encoder: TableEncoder | None = None,
) -> DataSplits:
    """Return the data set of clients that bring their own, of which this rank has some. A collective.

    Args:
        owners: what has the data, for errors.
        names: of each of them, for errors.
        homes: silo of every client.
        local: the data of the clients of this rank's silo. Without any, examples are made up.
        infos: the description of what each brings.
        agreement: of the silos, on what is measured of all examples.
        encoder: of the columns of tables; None: that of the training examples of all silos.

    Raises:
        ValueError: they bring examples of differing kinds, or a column has no values.
    """
    if error := kind_error(owners, names, infos):
        raise ValueError(error)
    columns, made_up_inputs = infos[0].columns, infos[0].inputs
    if columns is not None:
        encoder = encoder or columns.fit(table_rows(splits.train for splits in local.values()), agreement)
        raise_errors(encoder.errors)
        local = {client: splits.encoded_by(encoder) for client, splits in local.items()}
        made_up_inputs = f"float32 [{len(encoder.column_names)}]"

    def join(part: str) -> Source:
        sizes, sources = [getattr(info, part) for info in infos], {c: getattr(local[c], part) for c in local}
        made_up = None if local else MadeUpSource(made_up_inputs, infos[0].targets)
        return PerClientSource(sizes, sources, homes, [info.checksum for info in infos], made_up)

    classes = max((info.classes for info in infos if info.classes is not None), default=None)
    train, label_names = join("train"), tuple(infos[0].label_names)
    weights = _join_weights(local, len(train)) if any(info.has_weights for info in infos) else None
    validation = None if infos[0].validation is None else join("validation")
    joined = DataSplits(
        train,
        join("test"),
        classes,
        weights=weights,
        validation=validation,
        label_names=label_names,
        text_format=next((splits.text_format for splits in local.values()), None),
        encoder=encoder,
        agreement=agreement,
    )
    if not local and infos[0].token_sizes is not None:
        joined.token_bytes = np.zeros(classes or 0, np.int64)  # those who have examples count them
    return joined


def with_central(splits: DataSplits, own: DataSplits, name: str, info: DatasetInfo) -> DataSplits:
    """Return the data set of sites with the test set of their coordinator.

    Args:
        splits: of the sites.
        own: the coordinator's; all its examples are test examples.
        name: of one of the sites, for errors.
        info: the description of what this site brings.

    Raises:
        ValueError: the coordinator has examples of another kind.
    """
    kinds = [info, replace(DatasetInfo.of(own), validation=info.validation)]
    if error := kind_error("the sites and the coordinator", [name, "the coordinator"], kinds):
        raise ValueError(error)
    own = own.encoded_by(splits.encoder) if splits.encoder else own
    splits.central, splits.has_central = reduce(JoinedSource, own.parts.values()), True
    return splits


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
        shape = [ANY if name in padded else tensor.shape[1], *tensor.shape[2:]] if tensor.dim() > 1 else []
        sizes = ", ".join(map(str, shape))
        descriptions.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} [{sizes}]".strip())
    return ", ".join(descriptions)


def _gather_info(local: dict[int, DatasetInfo], errors: list[str], has_groups: bool) -> list[DatasetInfo]:
    """Gather the descriptions of all clients, in order; raise ValueError with the errors of all ranks."""
    text = json.dumps([errors, {client: asdict(info) for client, info in local.items()}])
    texts = collectives.all_gather_texts(text) if has_groups else [text]
    # Replicas of a silo send the same text.
    gathered: list[tuple[list[str], dict[str, Any]]] = [json.loads(text) for text in dict.fromkeys(texts)]
    if all_errors := list(dict.fromkeys(error for errors, _ in gathered for error in errors)):
        raise ValueError("\n".join(all_errors))
    infos = {int(client): DatasetInfo.from_tree(tree) for _, clients in gathered for client, tree in clients.items()}
    return [infos[client] for client in sorted(infos)]


def kind_error(owners: str, names: Sequence[str], infos: Sequence[DatasetInfo]) -> str:
    """Return an error for data that cannot be trained on together, empty if it can.

    Args:
        owners: what has the data, such as `the sites`.
        names: of each of them.
        infos: the description of what each has.
    """
    lines = []
    for field in ("inputs", "targets", "label_names", "token_sizes"):
        first, *kinds = (getattr(info, field) for info in infos)
        others = [f"{name} {kind}" for name, kind in zip(names[1:], kinds, strict=True) if kind != first]
        if others:
            lines.append(f"{field}: {names[0]} has {first}, but {', '.join(others[:MAX_NAMED])}")
    without = [name for name, info in zip(names, infos, strict=True) if info.validation is None]
    if 0 < len(without) < len(names):
        lines.append(f"validation: {', '.join(without[:MAX_NAMED])} without validation examples, and others have some")
        lines.append("set data.validation=0.1, to take them from the training examples of all")
    if any(line.startswith("label_names") for line in lines):
        lines.append("set data.classes= to the names of all classes, such as [cat,dog]")
    if any(line.startswith("token_sizes") for line in lines):
        lines.append("set data.tokenizer= to the same tokenizer")
    return "\n  ".join([f"{owners} hold different kinds of examples.", *lines]) if lines else ""
