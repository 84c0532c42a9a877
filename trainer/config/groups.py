"""Groups of the configuration and their choices: the files in conf/, and in the user's own folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from trainer.utils.trees import flatten

PACKAGE = Path(__file__).parents[1]
# In a source tree conf/ lies beside the package, in an installed one inside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.exists())

# Folders of the user's own yamls beside conf/, as the items of a list in Hydra's grammar; workers inherit it.
SEARCH_PATH = "SILOTRAIN_SEARCH_PATH"

LIST_GROUPS = ("client_shift", "transforms", "loggers")  # groups of any number of choices


def search_path_overrides() -> list[str]:
    """Return the override that adds the user's own folders of yamls, if there are any."""
    return [f"hydra.searchpath=[{os.environ[SEARCH_PATH]}]"] if SEARCH_PATH in os.environ else []


def yaml_folders() -> Iterator[Path]:
    """Return the folders from which a configuration is composed: conf/, and those of the user."""
    yield CONF
    # Paths with commas are quoted there.
    for _, kind, name in re.findall(r"""(['"]?)(file|pkg)://(.*?)\1(?:,|$)""", os.environ.get(SEARCH_PATH, "")):
        package = find_spec(name) if kind == "pkg" else None
        yield from map(Path, [name] if kind == "file" else (package and package.submodule_search_locations) or [])


def find_groups() -> dict[str, list[str]]:
    """Return the choices of each group, in the order of the defaults list."""
    return _find_groups(*yaml_folders())


@cache
def _find_groups(*folders: Path) -> dict[str, list[str]]:
    groups = [next(iter(entry)) for entry in _base()["defaults"] if entry != "_self_"]
    return {
        group: sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")}) for group in groups
    }


def sections() -> set[str]:
    """Return the names with which a key may begin: groups, and those at the top of config.yaml."""
    return {*find_groups(), *_base()}


@cache
def _base() -> dict[str, Any]:
    return yaml.safe_load((CONF / "config.yaml").read_text())


def choose(group: str, choice: str) -> str:
    """Return the override that makes the choice."""
    return f"{group}=[{choice}]" if group in LIST_GROUPS else f"{group}={choice}"


def chosen(group: str, value: str) -> list[str]:
    """Return the choices in the value of a group: one, or those of a list."""
    if group not in LIST_GROUPS or not (value.startswith("[") and value.endswith("]")):
        return [value]
    return [choice.strip() for choice in value[1:-1].split(",") if choice.strip()]


def file_text(group: str, choice: str) -> str:
    """Return the text of a choice's file; empty for one that lies elsewhere than in conf/."""
    path = CONF / group / f"{choice}.yaml"
    return path.read_text() if path.exists() else ""


@cache
def keys_in_file(group: str, choice: str) -> tuple[str, ...]:
    """Return the keys of its group that the file of a choice sets, as they are typed: `partition.alpha`."""
    text = file_text(group, choice)
    keys = flatten(yaml.safe_load(text) or {}, "" if "# @package _global_\n" in text else f"{group}.")
    return tuple(key for key in keys if key.startswith(f"{group}.") and key != f"{group}.defaults")
