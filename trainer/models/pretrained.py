"""The numbers that a model begins with, from a file; and which of them never change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

MAX_NAMED = 5  # of a kind of fault


def load_pretrained(module: nn.Module, path: Path) -> None:
    """Puts the tensors of a file into the model's parameters and buffers of the same names.

    The file is safetensors, such as a run's model.safetensors, or what torch.save made of a state_dict, of which
    nothing but tensors is read. Raises ValueError that names all tensors that are missing, unexpected or misshapen.
    """
    tensors, own = _read(path), module.state_dict()
    aliases = _aliases(module)
    missing = [name for name in own if not any(alias in tensors for alias in aliases.get(name, [name]))]
    unexpected = [name for name in tensors if name not in own]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in tensors
        if name in own and tensors[name].shape != own[name].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if said := [f"  {kind}: {_some(names)}" for kind, names in found.items() if names]:
        lines = "\n".join(said)
        raise ValueError(
            f"model.init={path} does not fit model={type(module).__name__}:\n{lines}\n"
            "  set the model that the file is of, or rename and leave out tensors in a copy of the file"
        )
    module.load_state_dict(tensors, strict=False)


def freeze(module: nn.Module, pattern: str) -> None:
    """Makes the parameters in whose names the regular expression is found such that they are not trained.

    Raises ValueError when it finds none, or all.
    """
    named = dict(module.named_parameters())
    found = [name for name in named if re.search(pattern, name)]
    if len(found) in (0, len(named)):
        what = "finds no parameter" if not found else "finds every parameter: nothing is left to train"
        raise ValueError(
            f"model.freeze={pattern} {what} of model={type(module).__name__}.\n  its names: {', '.join(named)}"
        )
    for name in found:
        named[name].requires_grad_(False)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"model.init={path} is no file.\n  valid: a safetensors file, or one that torch.save has written"
        )
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever the two libraries say of a file that is none of theirs
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"model.init={path} cannot be read: {reason}\n  valid: safetensors, or a state_dict"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        keys = f" with {_some(list(map(str, found)))}" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"model.init={path} holds a {type(found).__name__}{keys}, not only tensors by name.\n"
            "  save the state_dict by itself: torch.save(model.state_dict(), PATH)"
        )
    return found


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of a tensor, by each of them: of tied parameters a file may hold one."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return {name: same for same in names.values() for name in same}


def _some(names: list[str]) -> str:
    more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
