"""Settings that differ between runs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from trainer.checkpoint.run_dir import CHANGEABLE_KEYS
from trainer.utils.text import format_value

Settings = Mapping[str, Any]

TARGET = "._target_"


def configuration_of(settings: Settings) -> Hashable:
    """Return a key that is equal for runs that differ only in seed, folder and launch."""
    return frozenset((name, _hashable(value)) for name, value in settings.items() if _is_setting(name))


def differing(runs: Sequence[Settings]) -> list[str]:
    """Return the settings in which runs differ, the algorithm's first.

    A setting that only some classes have, such as a server's momentum, belongs to the class: it is returned only if it
    differs between runs that have it, or is missing where another run of the same class has it.
    """
    names = dict.fromkeys(name for run in runs for name in run if _is_setting(name))
    return sorted(filter(lambda name: _differs(name, runs), names), key=lambda name: not name.startswith("algorithm"))


def title(name: str) -> str:
    """Return the heading of a setting, `optimizer` for the class of the optimizer."""
    return name.removesuffix(TARGET)


def short_titles(names: Sequence[str]) -> list[str]:
    """Return the last part of each name where it is unique: `lr` for `optimizer.lr`."""
    last = [title(name).rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else title(name) for name, short in zip(names, last, strict=True)]


def setting_text(name: str, runs: Sequence[Settings]) -> list[str]:
    """Return the text of a setting in each run, a dash for none.

    Classes are shown without their module where that is unique.
    """
    values = [format_value(run[name]) if name in run else "–" for run in runs]
    last = {value: value.rpartition(".")[2] for value in values}
    short = name.endswith(TARGET) and len(set(last.values())) == len(last)
    return [last[value] for value in values] if short else values


def _is_setting(name: str) -> bool:
    return name != "seed" and not name.startswith(CHANGEABLE_KEYS)


def _differs(name: str, runs: Sequence[Settings]) -> bool:
    having = [run for run in runs if name in run]
    classes = {_classes(name, run) for run in having}
    values = {_hashable(run[name]) for run in having}
    return len(values) > 1 or any(name not in run and _classes(name, run) in classes for run in runs)


def _classes(name: str, run: Settings) -> tuple[Any, ...]:
    """Return the classes that a setting is an argument of, from the outermost."""
    parts = title(name).split(".")
    return tuple(run.get(".".join(parts[:depth]) + TARGET) for depth in range(1, len(parts)))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(inner)) for name, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
