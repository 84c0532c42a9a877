"""Overrides as text: those of a file, plain values in Hydra's grammar, and flags as other tools take them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config.groups import LIST_GROUPS, find_groups, keys_in_file
from trainer.utils.text import format_value
from trainer.utils.trees import flatten


def file_overrides(path: Path) -> list[str]:
    """Return the overrides that set the keys of a YAML file: `key: value`, `section: {key: value}`, `group: choice`.

    A group that is a mapping with a `_target_`, as in the config.yaml of a run folder, is a custom choice.

    Raises:
        ValueError: the file cannot be read, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} is no mapping\n  valid: a YAML file of keys and values, such as rounds: 10")
    overrides = []
    for key, value in tree.items():
        if not isinstance(value, dict):
            overrides.append(f"{key}={format_value(value) if key in find_groups() else literal(value)}")
        elif "_target_" in value and "custom" in find_groups().get(key, ()):
            overrides += [f"{key}=custom", *(f"++{key}.{name}={literal(item)}" for name, item in value.items())]
            of_run = flatten(value, f"{key}.")
            overrides += [f"~{name}" for name in keys_in_file(key, "custom") if name not in of_run]
        elif key in LIST_GROUPS:
            overrides += [f"++{key}.{name}={literal(item)}" for name, item in value.items()]
        else:
            overrides += [f"{name}={literal(item)}" for name, item in flatten(value, f"{key}.").items()]
    return overrides


def literal(value: Any) -> str:
    """Write a plain value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if not isinstance(value, str):
        return format_value(value)
    # Backslashes count only before a quote, and the last ones stand before the closing one.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', value))
    return f'"{escaped}"'


@dataclass(frozen=True)
class Typed:
    """An override, or a flag of another tool with its value, as it was typed.

    Attributes:
        text: the whole.
        name: its key, or the name of the flag.
        value: empty where none was typed.
    """

    text: str
    name: str
    value: str

    @property
    def is_flag(self) -> bool:
        return is_flag(self.text)

    @property
    def is_assignment(self) -> bool:
        """Whether it sets a key: neither a flag, nor a sign that adds or removes one, nor a bare word."""
        return self.text == f"{self.name}={self.value}"


def read_typed(arguments: Iterable[str]) -> list[Typed]:
    """Read overrides, and flags as other tools take them: `--lr=0.1`, `--lr 0.1`, `--lr`."""
    typed: list[Typed] = []
    for argument in arguments:
        if typed and _takes_value(typed[-1]) and not is_flag(argument) and "=" not in argument:
            typed[-1] = Typed(f"{typed[-1].text} {argument}", typed[-1].name, argument)
        else:
            name, _, value = argument.partition("=")
            typed.append(Typed(argument, name.lstrip("-+~"), value))
    return typed


def _takes_value(typed: Typed) -> bool:
    return typed.is_flag and typed.text.lstrip("-") == typed.name


def is_flag(argument: str) -> bool:
    """Return whether an argument is a flag; a negative number is none."""
    return re.match("--?[A-Za-z]", argument) is not None


def is_hydra_override(override: str) -> bool:
    """Return whether the override is for Hydra itself."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))
