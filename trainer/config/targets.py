"""Targets of a configuration that came from another process: data, until this process has named them itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.compose import CONF, SEARCH_PATH


def check_targets(tree: Any, own: Sequence[str]) -> None:
    """Check that every `_target_` of a configuration is named by this process too: only then is it instantiated.

    Args:
        tree: the configuration
        own: texts of this process: its arguments, or the configuration that it has composed. The files in conf/ and in
            the folders of `--config-dir` belong to it.

    Raises:
        ValueError: lists the targets that they do not name
    """
    foreign = _unnamed({*_targets(tree)}, "\n".join(own))
    if foreign:
        foreign = _unnamed(foreign, "\n".join(file.read_text() for file in _files()))
    if foreign:
        raise ValueError(
            f"the configuration that came from rank 0 names {', '.join(sorted(foreign))}, which neither the arguments "
            "nor the configuration files of this process name: refused.\n"
            "  start all processes with the same arguments and files"
        )


def _targets(tree: Any) -> Iterator[str]:
    """Return the targets at any depth."""
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield str(tree["_target_"])
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _targets(branch)


def _unnamed(targets: set[str], text: str) -> set[str]:
    """Return those that the text, of YAML, JSON or overrides, gives to no `_target_`."""
    named = set(re.findall(r"_target_['\"]?\s*[:=]\s*['\"]?([\w.]+)", text))
    return targets - named


def _files() -> Iterator[Path]:
    """Return the files from which this process would compose a configuration."""
    folders = [str(CONF)]
    for kind, name in re.findall(r"(file|pkg)://([^,'\"]+)", os.environ.get(SEARCH_PATH, "")):
        package = find_spec(name) if kind == "pkg" else None
        folders += [name] if kind == "file" else (package and package.submodule_search_locations) or []
    for folder in folders:
        yield from sorted(Path(folder).rglob("*.yaml"))
