"""Modules of torch.export, for versions that have no ONNX.

`torch.export.load` unpickles, loads shared libraries and evaluates expressions, if a file asks it to. Files of this
package's export ask for none of that, and only such files are given to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from trainer.service.version import EXPORTED_PROGRAM, ONNX, ModelDescription

GRAPH, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
# All files of an archive, below its folder. Weights and constants are plain bytes, as CONFIGS says.
MEMBER = re.compile(
    rf"{GRAPH}|{SAMPLE}|{'|'.join(CONFIGS)}|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)
OPERATION = re.compile(r"torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")
# Words in the size of a tensor: those of sympy that make numbers of numbers, and symbols.
SIZE = re.compile(
    r"Symbol|Integer|Rational|Add|Mul|Pow|Abs|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|Eq|Ne"
    r"|positive|nonnegative|integer|True|False|[a-z]\d+"
)
WORD = re.compile(r"[^\W\d]\w*")


class ExportedProgramEngine:
    """A module of torch.export, which takes the inputs in the order of the description."""

    platform = "pytorch_libtorch"

    def __init__(self, folder: Path, description: ModelDescription, threads: int):
        path = folder / EXPORTED_PROGRAM
        try:
            import torch
        except ImportError as error:
            raise ValueError(
                f"{folder} has no {ONNX}, and PyTorch, which {EXPORTED_PROGRAM} needs, is not installed\n"
                "  export it with --format onnx, or pip install silotrain"
            ) from error
        torch.set_num_threads(threads)
        self._torch: Any = torch
        sides = (description.inputs, description.outputs)
        self._inputs, self._outputs = ([spec.name for spec in side] for side in sides)
        try:
            check_archive(path)
            self._module = torch.export.load(path).module()
        except Exception as error:  # of archives, JSON, and operations that this PyTorch does not know
            raise ValueError(f"{path} cannot be loaded: {error}") from error

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = [self._torch.from_numpy(np.require(inputs[name], requirements=("C", "W"))) for name in self._inputs]
        with self._torch.inference_mode():
            try:
                outputs = self._torch.utils._pytree.tree_leaves(self._module(*tensors))
            except (IndexError, RuntimeError) as error:
                raise ValueError(str(error)) from error
        return {name: output.numpy() for name, output in zip(self._outputs, outputs, strict=True)}


def check_archive(path: Path) -> None:
    """Check that a file is a graph of PyTorch's own operations and plain tensors, and nothing else.

    Raises:
        ValueError: it asks for something to be unpickled, loaded or evaluated.
    """
    from torch import load

    try:
        with ZipFile(path) as archive:
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            if len(members) < len(archive.namelist()):
                raise ValueError("it contains a file twice")
            if foreign := [member for member in members if not MEMBER.fullmatch(member)]:
                raise ValueError(f"it contains {foreign[0]}")
            for config in CONFIGS:
                if any(each["use_pickle"] for each in json.loads(archive.read(members[config]))["config"].values()):
                    raise ValueError(f"its {config} has tensors that are pickled")
            graph = json.loads(archive.read(members[GRAPH]))
            with archive.open(members[SAMPLE]) as sample:
                load(sample, weights_only=True)  # else torch.export would unpickle it
    except (BadZipFile, KeyError) as error:
        raise ValueError(f"it is no archive of torch.export: {error}") from error
    for target in _values(graph, "target"):
        if isinstance(target, str) and not OPERATION.fullmatch(target):
            raise ValueError(f"it calls {target}")
    for size in _values(graph, "expr_str"):
        if unknown := [word for word in WORD.findall(size) if not SIZE.fullmatch(word)]:
            raise ValueError(f"it has a size of {unknown[0]}")


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key anywhere in a tree of JSON."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        for value in tree.values():
            yield from _values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)
