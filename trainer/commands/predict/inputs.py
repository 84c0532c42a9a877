"""The inputs of a model from files: tables, arrays, images and texts, by the readers of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.commands.exported_version import Version
from trainer.data import Source
from trainer.data.readers.image_folder import SUFFIXES, images_below, read_images
from trainer.data.readers.npz import read_npz_inputs
from trainer.data.readers.tables import read_table_inputs
from trainer.data.readers.text_inputs import TextInputs
from trainer.service.engine import Tensors
from trainer.service.errors import InferenceError
from trainer.service.protocol import Signature, datatype_of
from trainer.utils.tensor_trees import named_tensors

# Readers of tables, by the ends of names.
TABLES = {
    ".csv": "csv",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
COMPRESSED = (".gz", ".bz2", ".zst")
TABLE_READERS = ("trainer.data.csv", "trainer.data.jsonl", "trainer.data.parquet")

Settings = Mapping[str, Any]  # keys of data=, and their values


@dataclass(frozen=True)
class InputFile:
    """Examples of a file, or of the images of a folder.

    Attributes:
        source: of the inputs; its targets mean nothing.
        names: the file of each example.
        rows: its number in the file, from 0.
    """

    source: Source
    names: Sequence[str]
    rows: Sequence[int]

    @staticmethod
    def of(path: Path, source: Source) -> InputFile:
        """Return the examples of one file."""
        return InputFile(source, [str(path)] * len(source), range(len(source)))

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[Tensors]:
        """Yield the inputs by the names that exported models have for them, in batches of up to this size."""
        for ids in torch.arange(len(self)).split(size):
            inputs, _ = self.source.fetch(ids)
            yield {_input_name(name): tensor.numpy() for name, tensor in named_tensors(inputs).items()}


def read_file(path: Path, version: Version, typed: Settings) -> InputFile:
    """Read the examples of a file, or the images of a folder, and check that the model takes them.

    Args:
        path: the file or folder.
        version: the model. How it was trained says which columns are inputs.
        typed: keys of data= that are set otherwise.

    Raises:
        ValueError: the file cannot be read, or has other inputs than the model takes.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    if path.is_dir() or suffix in SUFFIXES:
        files = sorted(images_below(path)) if path.is_dir() else [path]
        found = _read_images(path, files, version, typed)
    elif suffix in TABLES:
        settings = {**(version.data if version.data.get("_target_") in TABLE_READERS else {}), **typed}
        table = read_table_inputs(TABLES[suffix], path, version.encoder, **_arguments(read_table_inputs, settings))
        found = InputFile.of(path, table)
    elif suffix == ".npz":
        settings = {**(version.data if version.data.get("_target_") == "trainer.data.npz" else {}), **typed}
        found = InputFile.of(path, read_npz_inputs(path, **_arguments(read_npz_inputs, settings)))
    elif suffix == ".txt":
        found = InputFile.of(path, _read_texts(path, version, typed))
    else:
        valid = ", ".join((*TABLES, ".npz", ".txt", *sorted(SUFFIXES)))
        raise ValueError(f"{path}: it is of no known format\n  valid: a folder of images, or a file named *{valid}")
    _check_inputs(path, found, version)
    return found


def _arguments(read: Callable[..., Source], settings: Settings) -> dict[str, Any]:
    """Return those settings that a reader takes."""
    return {name: value for name, value in settings.items() if name in signature(read).parameters and name != "path"}


def _read_images(path: Path, files: Sequence[Path], version: Version, typed: Settings) -> InputFile:
    if not files:
        raise ValueError(f"{path}: there are no images in it ({', '.join(sorted(SUFFIXES))})")
    shape = version.description.inputs[0].shape
    channels = shape[1] if len(shape) == 4 else 3
    settings = {"channels": channels, "size": version.data.get("size"), **typed}
    source = read_images(files, **_arguments(read_images, settings))
    return InputFile(source, list(map(str, files)), [0] * len(files))


def _read_texts(path: Path, version: Version, typed: Settings) -> Source:
    """Read a text of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = {**version.data, **typed}
    texts = TextInputs.of(lines, settings.get("tokenizer"), settings.get("text_length", 512))
    return texts.source(np.arange(len(lines)), torch.zeros(len(lines), dtype=torch.int64), None)


def _input_name(name: str) -> str:
    """Return the name of an input in an exported model, by its name in a tree."""
    return f"inputs_{name}".rstrip("_") if name.isdigit() or not name else name


def _check_inputs(path: Path, found: InputFile, version: Version) -> None:
    """Raise ValueError if the model takes other inputs."""
    taken = Signature(version.description)
    (inputs,) = InputFile(found.source, found.names[:1], found.rows[:1]).batches(1)
    try:
        for name, tensor in inputs.items():
            taken.check_input(name, datatype_of(tensor.dtype), [1, *tensor.shape[1:]])
        taken.check_whole(inputs, len(inputs))
    except InferenceError as error:
        raise ValueError(f"{path} does not fit the model: {error}\n  choose its inputs by data.inputs=") from error
