"""A version of an exported model: the folder MODELS/<name>/<version>/, its files, its description, and their checks.

The layout is the one that Triton, OpenVINO Model Server and KServe watch. `model.json` describes a version and has the
checksum of every other file in it: a folder without it, or with a file that is not the one described, is no version.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

FORMAT = 1

DESCRIPTION = "model.json"
ONNX = "model.onnx"
EXPORTED_PROGRAM = "model.pt2"
HUGGINGFACE = "huggingface"
EXAMPLE_REQUEST = "example.json"
EXAMPLE_RESPONSE = "example_response.json"
CARD = "README.md"
CONFIG = "config.yaml"  # of the run, without its folder and how it was launched
COLUMNS = "columns.json"  # of tables: how their rows become inputs

# The data types of the Open Inference Protocol that exported models have.
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"
]

_strict = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_strict)
class TensorSpec:
    """Name, data type and shape of an input or output. -1 is any size; the first dimension is that of the batch."""

    name: str
    datatype: Datatype
    shape: list[int]


@dataclass(frozen=True, config=_strict)
class ModelDescription:
    """The content of model.json.

    Attributes:
        inputs: raw ones, before the transforms of evaluation, which are in the graph.
        outputs: `outputs` of the model, and what the task makes of them, such as `scores` and `label`.
        task: the class of the run's task, in words.
        label_names: names of the classes, by label; empty if they have none.
        headline: the most telling name in `metrics`; empty without metrics.
        metrics: figures of the model that was exported, by name.
        provenance: run, round, seed, checksums of configuration and data, versions of libraries. No paths, no hosts.
        quantisation: method and cost of a quantised model; None for one that is not.
        sha256: of every other file of the folder, by its path in it.
    """

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    task: str
    headline: str
    sha256: dict[str, str]
    label_names: list[str] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    quantisation: dict[str, Any] | None = None
    format: Literal[1] = FORMAT

    def to_json(self) -> str:
        """Return the text of model.json; metrics that are not finite are null."""
        described = asdict(self)  # pyright: ignore[reportArgumentType] (it is a dataclass of pydantic)
        finite = {
            name: value if value is not None and math.isfinite(value) else None for name, value in self.metrics.items()
        }
        return json.dumps({**described, "metrics": finite}, indent=1, allow_nan=False) + "\n"


def read_version(folder: Path) -> ModelDescription:
    """Read the description of a version, and check the files that it describes.

    Raises:
        ValueError: it is no whole version: model.json is missing or not valid, or a file is missing or another one.
    """
    description = _description(folder / DESCRIPTION)
    for name, expected in description.sha256.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink() or not path.is_file():
            raise ValueError(f"{folder}: {name} is missing")
        try:
            found = sha256(path)
        except FileNotFoundError as error:  # an exporter removes the version meanwhile
            raise ValueError(f"{folder}: {name} is missing") from error
        if found != expected:
            raise ValueError(f"{folder}: {name} is not the file that was exported: its checksum differs")
    if not {ONNX, EXPORTED_PROGRAM} & description.sha256.keys():
        raise ValueError(f"{folder} has neither {ONNX} nor {EXPORTED_PROGRAM}")
    return description


def version_numbers(model: Path) -> list[int]:
    """Return the numbers of the folders that may be versions of a model, the newest last."""
    found = (path.name for path in model.iterdir() if path.is_dir())
    return sorted(int(name) for name in found if name.isascii() and name.isdigit() and name == str(int(name)))


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file below a folder but model.json, by its path in it."""
    return {str(path.relative_to(folder)): sha256(path) for path in _files(folder)}


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DESCRIPTION)


def _description(path: Path) -> ModelDescription:
    try:
        return TypeAdapter(ModelDescription).validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is no exported version: it has no {path.name}") from error
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {where or 'it'}: {first['msg']}") from error
