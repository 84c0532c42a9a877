"""Targets of a configuration that came from another process or a run folder: data, until this process names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.groups import CONF, yaml_folders
from trainer.utils.trees import flatten


def check_targets(tree: Any, own: Sequence[str]) -> None:
    """Check that every `_target_` of a configuration is named by this process too: only then is it instantiated.

    Args:
        tree: the configuration
        own: texts of this process: its arguments, or the configuration that it has composed. The files in conf/ and in
            the folders of `--config-dir` belong to it.

    Raises:
        ValueError: lists the targets that they do not name
    """
    foreign = _unnamed({*find_targets(tree)}, "\n".join(own))
    if foreign := foreign and _unnamed(foreign, _configuration_files()):
        raise ValueError(
            f"the configuration that came from rank 0 names {', '.join(sorted(foreign))}, which neither the arguments "
            "nor the configuration files of this process name: refused.\n"
            "  start all processes with the same arguments and files"
        )


def check_saved_targets(tree: Any, file: Path) -> None:
    """Check that the targets of a saved configuration are the user's: in the configuration files, or a module here.

    Args:
        tree: the configuration.
        file: from which it was read.

    Raises:
        ValueError: lists the others.
    """
    if foreign := _foreign(tree, file):
        raise ValueError(
            f"{file} names {foreign}, which neither conf/ nor a module here has: refused.\n"
            "  start in the folder of its module, or, if you trust the run folder, with "
            f"--config {file} run_dir={file.parent}"
        )


def check_run_targets(tree: Any, file: Path) -> None:
    """Check likewise the targets of a run folder whose model is used, and not trained on.

    Raises:
        ValueError: lists those that are not the user's.
    """
    if foreign := _foreign(tree, file):
        raise ValueError(
            f"{file} names {foreign}, which neither conf/ nor a module here has: refused.\n"
            "  start in the folder of its module, or, if you trust that code, name it in a file of --config-dir"
        )


def _foreign(tree: Any, file: Path) -> str:
    """List the targets that are neither in the configuration files nor of a module here."""
    _check_no_references(tree, file)
    foreign = {
        target for target in _unnamed({*find_targets(tree)}, _configuration_files()) if not _is_in_folder(target)
    }
    return ", ".join(sorted(foreign))


def _is_in_folder(target: str) -> bool:
    """Return whether a target belongs to a module or a package that lies in the working directory, other than ours."""
    module = target.partition(".")[0]
    try:
        spec = None if module == "trainer" else find_spec(module)
    except ValueError:  # of a module that has no file
        return False
    places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    return bool(places) and all(Path(place).parent == Path.cwd() for place in places)


def _configuration_files() -> str:
    """Return the texts of the files from which this process would compose a configuration."""
    files = (file for folder in yaml_folders() for file in sorted(folder.rglob("*.yaml")))
    return "\n".join(file.read_text() for file in files)


def check_trusted(tree: Any, trust: Sequence[str], folder: Path) -> None:
    """Check that parts of a run folder's configuration name this package's classes, and those that the caller trusts.

    Args:
        tree: the parts by their groups, such as `model`.
        trust: targets that the caller names.
        folder: the run folder, for the error.

    Raises:
        ValueError: lists the targets that are neither, of which none was imported.
    """
    _check_no_references(tree, folder / "config.yaml")
    own = "\n".join(file.read_text() for group in tree for file in sorted((CONF / group).glob("*.yaml")))
    if foreign := sorted(_unnamed({*find_targets(tree)} - {*trust}, own)):
        names = ", ".join(map(repr, foreign))
        raise ValueError(
            f"{folder}/config.yaml names {', '.join(foreign)}, which is not silotrain's: nothing was imported.\n"
            f"  if you trust that code: trust=[{names}]"
        )


def _check_no_references(tree: Any, file: Path) -> None:
    """Raise ValueError for references of OmegaConf, by which a configuration would read environment variables."""
    if any("${" in str(value) for value in flatten(tree).values()):
        raise ValueError(f"{file} has references, and a run writes none: refused.")


def find_targets(tree: Any) -> Iterator[str]:
    """Yield the targets of a configuration, at any depth."""
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield str(tree["_target_"])
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from find_targets(branch)


def _unnamed(targets: set[str], text: str) -> set[str]:
    """Return those that the text, of YAML, JSON or overrides, gives to no `_target_`."""
    named = set(re.findall(r"_target_['\"]?\s*[:=]\s*['\"]?([\w.]+)", text))
    return targets - named
