"""The model of a run folder as a plain module, for notebooks and other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from trainer.checkpoint.run_dir import RunDir
from trainer.config.adapter import adapt
from trainer.config.instantiate import instantiate
from trainer.config.targets import check_trusted
from trainer.models.adapters import adapter_parameters, is_adapted
from trainer.models.pretrained import find_weights_file, load_pretrained, load_saved
from trainer.utils.seeding import preserve_random_states, seed_default_generators

Weights = Literal["best", "last", "ema"]
PARTS = ("model", "adapter")  # of a configuration, from which a model is made


def load_model(run_dir: str | os.PathLike[str], weights: Weights = "last", trust: Sequence[str] = ()) -> nn.Module:
    """Load the model of a finished run: a plain module on the CPU, in evaluation mode, with its buffers.

    Nothing is unpickled. The folder's config.yaml says how the model is made, so a folder could name any code: that is
    imported only if it belongs to silotrain, or is trusted.

    Args:
        run_dir: the run folder.
        weights: `last` are those at the end of the run, `best` those of the best saved round, by `monitor=`, and `ema`
            the average over the run with `ema_decay=`.
        trust: dotted names of classes and functions of your own that may be imported and called, such as
            `my_module.Net`.

    Raises:
        ValueError: the folder has no such model, names other code, or its weights do not fit.
    """
    folder = RunDir(Path(run_dir))
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}\n  valid: {', '.join(map(repr, get_args(Weights)))}")
    if not folder.config.is_file():
        raise ValueError(f"{folder.path} is no run folder: it has no config.yaml")
    path = find_weights(folder, weights)
    settings, device = folder.settings(), torch.device("cpu")
    if missing := [name for name in (*PARTS, "seed") if name not in settings]:
        raise ValueError(f"{folder.path}/config.yaml has no {', '.join(missing)}: it is of another version, or damaged")
    check_trusted({name: settings[name] for name in PARTS}, trust, folder.path)
    with preserve_random_states(device):
        seed_default_generators(device, settings["seed"], "initial parameters")
        module = _make(settings)
    load_weights(module, path)
    return module.eval()


def find_weights(folder: RunDir, weights: Weights) -> Path:
    """Return the file with these weights of a finished run; raise ValueError if there is none."""
    path = find_weights_file(folder.models[weights])
    if path is None:
        there = [repr(name) for name, other in folder.models.items() if find_weights_file(other)]
        raise ValueError(
            f"{folder.path} has no {folder.models[weights].name}; its run is {folder.status() or 'unknown'}.\n"
            f"  valid: {', '.join(there) or 'none until the run has finished: the same command continues it'}"
        )
    return path


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a model that a run has written into a module made as the run has made it.

    The files of a run do not have the parameters below an adapter, which come from where the run had them: a file, or
    its seed.
    """
    base = set[str]()
    if is_adapted(module):
        base = {name for name, _ in module.named_parameters(remove_duplicate=False)} - adapter_parameters(module)
    load_saved(module, path, base)


def _make(settings: Mapping[str, Any]) -> nn.Module:
    """Make a model as its run has made it, without the initial weights that those of a file replace."""
    component = settings["model"]
    module: nn.Module = instantiate("model", component)
    if not has_adapter(settings):
        return module
    if (path := component.get("init")) is not None:
        load_pretrained(module, Path(path).expanduser())
    adapt(module, settings["adapter"])
    return module


def has_adapter(settings: Mapping[str, Any]) -> bool:
    """Return whether a run has trained an adapter on a model that its files do not have."""
    return instantiate("adapter", settings["adapter"]) is not None
