"""The typed spine of the configuration: what the frame reads itself. Leaves with a `_target_` are built, not read.

Faults are collected, so that a user mends all of them at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from trainer.utils.text import nearest, shown

Leaf = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a value may be, and how that is said to a user."""

    valid: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.valid}, or {other.valid}", lambda value: self.accepts(value) or other.accepts(value))


def whole(least: int) -> Kind:
    """Integers from `least` on."""
    return Kind(f"a whole number from {least}", lambda value: type(value) is int and value >= least)


def number(least: float, below: float = float("inf")) -> Kind:
    """Numbers from `least` to, but not including, `below`."""
    valid = f"a number from {least:g}" + (f" to below {below:g}" if below < float("inf") else "")
    return Kind(valid, lambda value: type(value) in (int, float) and least <= value < below)


def words(*choices: Any) -> Kind:
    """One of a few words; None is written null."""
    return Kind(" or ".join(map(shown, choices)), lambda value: value in choices)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(whole(1).accepts(size) for size in value)


def _is_range(value: Any) -> bool:
    return _is_sizes(value) and len(value) == 2 and value[0] <= value[1]


def _is_paths(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value))


sizes = Kind("a list of sizes such as [3,1]", _is_sizes)
span = Kind("[least,most] such as [2,5]", _is_range)
paths = Kind("a list of files such as [a.npz,b.npz], or null", _is_paths)
finite = Kind("a number", lambda value: type(value) in (int, float) and math.isfinite(value))
switch = Kind("true or false", lambda value: type(value) is bool)
text = Kind("a text (digits as \"'7'\")", lambda value: isinstance(value, str))
leaf = Kind(
    "a mapping with a _target_", lambda value: isinstance(value, dict) and isinstance(value.get("_target_"), str)
)
leaves = Kind(
    "a mapping of names to mappings with a _target_",
    lambda value: isinstance(value, dict) and all(leaf.accepts(part) for part in value.values()),
)


def _is_pattern(value: Any) -> bool:
    with suppress(re.error):
        return isinstance(value, str) and re.compile(value) is not None
    return False


def _are_rates(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(_is_pattern(name) and number(0).accepts(factor) for name, factor in value)


pattern = Kind("a regular expression", _is_pattern)
rates = Kind("a list of names, as regular expressions, with factors, such as [[head,10]]", _are_rates)

# Keys of leaves that the frame reads: what is made of a leaf is not given them.
OWN_KEYS = {
    "data": {"validation": number(0, 1), "files": paths, "cache_on_gpu": switch | words("auto")},
    "optimizer": {"exclude_norm_bias_decay": switch, "lr_multipliers": rates},
    "model": {"init": text | words(None), "freeze": pattern | words(None)},
}


def for_target(key: str, leaf: Leaf) -> Leaf:
    """The leaf without the keys that the frame reads."""
    return {name: value for name, value in leaf.items() if name not in OWN_KEYS.get(key, ())}


def given(key: str, leaf: Leaf) -> str:
    """The leaf's values as they are typed, as a line of a message; empty when there are none."""
    values = for_target(key, leaf).items()
    typed = ", ".join(f"{key}.{name}={shown(value)}" for name, value in values if name != "_target_")
    return f"\n  given: {typed}" if typed else ""


def setting(kind: Kind) -> Any:
    """A dataclass field that holds a value of this kind."""
    return field(metadata={"kind": kind})


@dataclass(frozen=True)
class RoundConfig:
    epochs: int | list[int] = setting(whole(1) | span)
    steps: int | None = setting(whole(1) | words(None))
    sync_rounds: int = setting(whole(0))
    deadline_seconds: float | None = setting(number(0) | words(None))
    stragglers: Literal["keep", "drop"] = setting(words("keep", "drop"))


@dataclass(frozen=True)
class ClipConfig:
    max_norm: float | None = setting(number(1e-12) | words(None))
    norm_type: float = setting(words(1, 2, math.inf))
    max_value: float | None = setting(number(1e-12) | words(None))


@dataclass(frozen=True)
class StopConfig:
    metric_target: float | None = setting(finite | words(None))
    patience_evaluations: int | None = setting(whole(1) | words(None))
    max_training_seconds: float | None = setting(number(0) | words(None))


@dataclass(frozen=True)
class EvalConfig:
    every_rounds: int = setting(whole(1))
    batch_size: int = setting(whole(1))
    personal_steps: int = setting(whole(0))


@dataclass(frozen=True)
class CheckpointConfig:
    every_rounds: int = setting(whole(1))
    every_seconds: float | None = setting(number(0) | words(None))
    keep_last: int = setting(whole(1))


@dataclass(frozen=True)
class MetricsConfig:
    per_client: Literal["full", "scores", "none"] = setting(words("full", "scores", "none"))
    peak_flops: float | str = setting(number(1) | words("auto"))
    measure_flops: bool | str = setting(switch | words("auto"))


@dataclass(frozen=True)
class RunConfig:
    smoke: bool = setting(switch)
    profile: bool = setting(switch)


@dataclass(frozen=True)
class PrecisionConfig:
    autocast: str | None = setting(words("bfloat16", "float16", None))
    tf32: bool = setting(switch)


@dataclass(frozen=True)
class LaunchConfig:
    nproc_per_node: int | str = setting(whole(1) | words("auto"))
    nodes: int | list[int] = setting(whole(1) | span)
    rdzv_endpoint: str | None = setting(text | words(None))
    threads_per_worker: int | str = setting(whole(1) | words("auto"))
    device: str = setting(words("auto", "cpu", "cuda"))
    max_restarts: int = setting(whole(0))
    max_seconds: float | None = setting(number(0) | words(None))
    silo_timeout_seconds: float = setting(number(1))
    inter_silo_timeout_seconds: float = setting(number(1))
    backend: str = setting(words("auto", "gloo", "nccl"))
    inter_silo_backend: str = setting(words("auto", "gloo", "nccl"))


@dataclass(frozen=True)
class Config:
    """A resolved configuration; conf/config.yaml says what each key means."""

    round: RoundConfig
    clip: ClipConfig
    stop: StopConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    run: RunConfig
    precision: PrecisionConfig
    launch: LaunchConfig
    name: str | None = setting(text | words(None))
    seed: int = setting(whole(0))
    rounds: int = setting(whole(1))
    silos: int | str | list[int] = setting(whole(1) | sizes | words("node"))
    clients: int | str = setting(whole(1) | words("auto"))
    batch_size: int | str = setting(whole(1) | words("all"))
    micro_batch_size: int | Literal["auto"] | None = setting(whole(1) | words("auto", None))
    ema_decay: float | None = setting(number(0, 1) | words(None))
    max_nonfinite_rounds: int = setting(whole(1))
    on_nonfinite_loss: str = setting(words("stop", "skip"))
    deterministic: bool = setting(switch)
    compile_backend: str | None = setting(words("inductor", "aot_eager", None))
    channels_last: bool = setting(switch)
    objective: str | None = setting(text | words(None))
    run_dir: str | None = setting(text | words(None))
    require_shared_run_dir: bool = setting(switch)
    resume: str = setting(text)
    data: Leaf = setting(leaf)
    client_shift: dict[str, Leaf] = setting(leaves)
    transforms: dict[str, Leaf] = setting(leaves)
    loggers: dict[str, Leaf] = setting(leaves)
    model: Leaf = setting(leaf)
    task: Leaf = setting(leaf)
    optimizer: Leaf = setting(leaf)
    schedule: Leaf = setting(leaf)
    server: Leaf = setting(leaf)
    update_compression: Leaf = setting(leaf)
    partition: Leaf = setting(leaf)
    client_sampling: Leaf = setting(leaf)
    gradient_compression: Leaf = setting(leaf)
    algorithm: Leaf = setting(leaf)


def read_config(values: Mapping[str, Any]) -> Config:
    """The Config that a resolved tree of plain values describes; ValueError names every fault."""
    faults: list[str] = []
    config = _read(Config, values, "", faults)
    for key, kinds in OWN_KEYS.items():
        own = values[key] if isinstance(values.get(key), Mapping) else {}
        wrong = {name: kind for name, kind in kinds.items() if name in own and not kind.accepts(own[name])}
        faults += [f"{key}.{name}={shown(own[name])}\n  valid: {kind.valid}" for name, kind in wrong.items()]
    if faults:
        raise ValueError("\n".join(faults))
    return config


def _read(kind: type, values: Mapping[str, Any], prefix: str, faults: list[str]) -> Any:
    known = {item.name: item for item in fields(kind)}
    valid = [prefix + name for name in known]
    unknown = [prefix + name for name in values if name not in known]
    faults += [f"{name} is no key of the configuration{nearest(name, valid)}" for name in unknown]
    hints = get_type_hints(kind)
    read: dict[str, Any] = {}
    for name, item in known.items():
        value = values.get(name)
        if is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                read[name] = _read(hints[name], value, f"{prefix}{name}.", faults)
            else:
                keys = ", ".join(f"{prefix}{name}.{item.name}" for item in fields(hints[name]))
                faults.append(f"{prefix}{name}={shown(value)}\n  valid: {keys}")
            continue
        if not item.metadata["kind"].accepts(value):
            faults.append(f"{prefix}{name}={shown(value)}\n  valid: {item.metadata['kind'].valid}")
        read[name] = value
    return None if faults else kind(**read)
