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

    The index is written last. An earlier model of the name is removed where it is of the other kind.

    Args:
        path: such as model.safetensors; several files are model-00001-of-00002.safetensors and so on.
        tensors: by name.
    """
    groups = _groups(tensors)
    index = path.with_name(path.name + INDEX)
    index.unlink(missing_ok=True)  # until all its files are there it would name others
    if len(groups) == 1:
        write_tensors(path, tensors)
        return
    names = [f"{path.stem}-{place:05d}-of-{len(groups):05d}{path.suffix}" for place in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_tensors(path.with_name(name), group)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    path.unlink(missing_ok=True)


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
