"""Initial weights from a file, and frozen parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.models.buffers import empty_buffers, load_buffers

WEIGHTS = "model.safetensors"
INDEX = ".index.json"  # after the name of a file: the list of the files in its place, as Hugging Face has it
SET_ANOTHER = "\n  set the model that the file was saved from, or rename and remove tensors in a copy of the file"
PERSONAL = "\n  with algorithm.shared_params the other parameters stay with the clients, and are in checkpoints alone"
MAX_NAMED = 5  # tensors per kind of mismatch in an error


def load_pretrained(module: nn.Module, path: Path) -> None:
    """Load a file of tensors into the parameters and buffers of the same names.

    Args:
        module: the model to change.
        path: a safetensors file, such as a run's model.safetensors; a folder with one, or with several and their index;
            or a state_dict saved by torch.save, from which only tensors are read.

    Raises:
        ValueError: the file cannot be read, or tensors are missing, unexpected, or of another shape. All are named, and
            nothing is loaded.
    """
    tensors, expected = _read(path), module.state_dict()
    aliases = _aliases(module)
    missing = [name for name in expected if not any(alias in tensors for alias in aliases.get(name, [name]))]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in tensors
        if name in expected and tensors[name].shape != expected[name].shape
    ]
    mismatches = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if lines := [f"  {kind}: {_first_few(names)}" for kind, names in mismatches.items() if names]:
        raise ValueError(
            "\n".join([f"model.init={path} does not fit model={type(module).__name__}:", *lines])
            + (_reordering(missing, tensors) or SET_ANOTHER)
        )
    module.load_state_dict(tensors, strict=False)


def load_saved(module: nn.Module, path: Path, base: Collection[str] = ()) -> None:
    """Load the model that a run has written, with buffers of whatever shapes they had at its end.

    Args:
        module: the model as it is made.
        path: a safetensors file, or the index of several.
        base: names of tensors that are in the module already, and need not be in the file.

    Raises:
        ValueError: the file cannot be read, or lacks tensors of the module, or has others.
    """
    try:
        tensors = _read_index(path) if path.name.endswith(INDEX) else load_file(path)
    except Exception as error:  # the library does not document what it raises for a file of another format
        raise ValueError(f"{path} cannot be read: {error}") from error
    buffers = _buffers(module)
    aliases, expected = _aliases(module), module.state_dict()
    wanted = [name for name in expected if name not in base]
    missing = [name for name in wanted if not any(alias in tensors for alias in aliases.get(name, [name]))]
    unexpected = [name for name in tensors if name not in expected and name not in buffers]
    if missing or unexpected:
        kinds = {"lacks": missing, "has besides": unexpected}
        found = "; it ".join(f"{kind} {_first_few(names)}" for kind, names in kinds.items() if names)
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it {found}." + (_reordering(missing, tensors) or PERSONAL)
        )
    load_tensors(module, tensors)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into the parameters and buffers of these names, buffers in whatever shapes they have now."""
    other_shapes = {
        name: tensors[name]
        for name, buffer in _buffers(module).items()
        if name in tensors and (buffer is None or not (is_lazy(buffer) or buffer.shape == tensors[name].shape))
    }
    load_buffers(module, other_shapes)
    module.load_state_dict(tensors, strict=False)


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module by their names, those that are not set yet among them."""
    return {**dict.fromkeys(empty_buffers(module)), **dict(module.named_buffers(remove_duplicate=False))}


def freeze(module: nn.Module, pattern: str) -> None:
    """Exclude the parameters whose names match a regular expression from training.

    Args:
        module: the model to change.
        pattern: searched anywhere in the names.

    Raises:
        ValueError: the pattern matches no parameter, or all of them.
    """
    named = dict(module.named_parameters())
    matching = [name for name in named if re.search(pattern, name)]
    if len(matching) in (0, len(named)):
        problem = "matches every parameter, so nothing is left to train," if matching else "matches no parameter"
        raise ValueError(
            f"model.freeze={pattern} {problem} of model={type(module).__name__}.\n  its names: {', '.join(named)}"
        )
    for name in matching:
        named[name].requires_grad_(False)


def find_weights_file(path: Path) -> Path | None:
    """Return a safetensors file, or the index of the files in its place; None if there is neither."""
    index = path.with_name(path.name + INDEX)
    return path if path.is_file() else index if index.is_file() else None


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        path = find_weights_file(path / WEIGHTS) or path / WEIGHTS
    path = find_weights_file(path) or path
    if path.name.endswith(INDEX):
        return _read_index(path)
    if not path.is_file():
        raise ValueError(
            f"model.init={path} is not a file.\n  valid: a safetensors file, a folder with model.safetensors, or a "
            "state_dict saved by torch.save"
        )
    is_safetensors = path.suffix == ".safetensors"
    try:
        content = load_file(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # neither library documents what it raises for a file of another format
        # That of torch proposes weights_only=False, which executes whatever a file has in it.
        reason = str(error).split("\n")[0] if is_safetensors else "it is damaged, or holds more than tensors"
        raise ValueError(
            f"model.init={path} cannot be read: {reason}\n  valid: safetensors, or a state_dict"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = f" with {_first_few(list(map(str, content)))}" if isinstance(content, Mapping) else ""
        raise ValueError(
            f"model.init={path} holds a {type(content).__name__}{keys}, not only tensors by name.\n"
            "  save only the state_dict: torch.save(model.state_dict(), PATH)"
        )
    return content


def _read_index(path: Path) -> Mapping[str, Tensor]:
    """Read the files that an index lists."""
    try:
        files = {str(file) for file in json.loads(path.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.init={path} is damaged\n  valid: a weight_map of tensors to files") from error
    if outside := sorted(file for file in files if Path(file).name != file):
        raise ValueError(f"model.init={path} names {outside[0]}\n  valid: files of the same folder")
    if missing := sorted(file for file in files if not (path.parent / file).is_file()):
        raise ValueError(f"model.init={path} names {', '.join(missing)}, which the folder does not have")
    return {name: tensor for file in sorted(files) for name, tensor in _read(path.parent / file).items()}


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Map each name to all names of its tensor. A file may have one name of tied parameters."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return {name: same for same in names.values() for name in same}


def _reordering(missing: Collection[str], tensors: Mapping[str, Tensor]) -> str:
    """Return the remedy for a file of an earlier version, whose attention has its rows in another order; or nothing."""
    earlier = {name: name.replace("attention_heads", "attention") for name in missing}
    renamed = sorted(name for name, old in earlier.items() if old != name and old in tensors)
    if not renamed:
        return ""
    return (
        f"\n  an earlier version had the rows of {earlier[renamed[0]]} in another order: all queries, keys, values.\n"
        f"  in a copy of the file, order those of weights and biases by heads, and save them as {renamed[0]}: "
        "rows.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)"
    )


def _first_few(names: list[str]) -> str:
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
