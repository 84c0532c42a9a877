"""The files of a finished model: one, or several with an index, as the libraries of Hugging Face read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from trainer.checkpoint.files import write_text
from trainer.checkpoint.format import LazyTensor, write_tensors
from trainer.models.pretrained import INDEX

MAX_FILE_BYTES = 5_000_000_000  # of a file, as save_pretrained has it by default

Tensors = Mapping[str, Tensor | LazyTensor]


def write_model(path: Path, tensors: Tensors) -> None:
    """Write the tensors of a model to a file, one after the other, or to several with an index if they are large.

    The index is written last, when the files of an earlier model of the name are removed.

    Args:
        path: such as model.safetensors; several files are model-00001-of-00002.safetensors and so on.
        tensors: by name.
    """
    groups = _groups(tensors)
    index = path.with_name(path.name + INDEX)
    index.unlink(missing_ok=True)  # until all its files are there it would name others
    places = range(1, len(groups) + 1)
    several = [f"{path.stem}-{place:05d}-of-{len(groups):05d}{path.suffix}" for place in places]
    names = several if len(groups) > 1 else [path.name]
    for name, group in zip(names, groups, strict=True):
        write_tensors(path.with_name(name), group)
    for earlier in (path, *path.parent.glob(f"{path.stem}-?????-of-?????{path.suffix}")):
        if earlier.name not in names:
            earlier.unlink(missing_ok=True)
    if len(groups) == 1:
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")


def read_all(tensors: Tensors) -> dict[str, Tensor]:
    """Return all tensors, in memory."""
    return {name: tensor if isinstance(tensor, Tensor) else tensor.read() for name, tensor in tensors.items()}


def _groups(tensors: Tensors) -> list[dict[str, Tensor | LazyTensor]]:
    """Return the tensors in groups of at most MAX_FILE_BYTES, or of one tensor, in their order."""
    groups: list[dict[str, Tensor | LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > MAX_FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups
