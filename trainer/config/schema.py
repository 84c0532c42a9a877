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

from trainer.utils.text import format_value, suggest

ComponentConfig = dict[str, Any]


@dataclass(frozen=True)
class ValueType:
    """What a value may be, and how that is said to a user."""

    valid: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: ValueType) -> ValueType:
        return ValueType(f"{self.valid}, or {other.valid}", lambda value: self.accepts(value) or other.accepts(value))


def integers(least: int) -> ValueType:
    """Integers from `least` on."""
    return ValueType(f"a whole number from {least}", lambda value: type(value) is int and value >= least)


def numbers(least: float, below: float = float("inf")) -> ValueType:
    """Numbers from `least` to, but not including, `below`."""
    valid = f"a number from {least:g}" + (f" to below {below:g}" if below < float("inf") else "")
    return ValueType(valid, lambda value: type(value) in (int, float) and least <= value < below)


def choices(*options: Any) -> ValueType:
    """One of a few words; None is written null."""
    return ValueType(" or ".join(map(format_value, options)), lambda value: value in options)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(integers(1).accepts(size) for size in value)


def _is_range(value: Any) -> bool:
    return _is_sizes(value) and len(value) == 2 and value[0] <= value[1]


def _is_paths(value: Any) -> bool:
    return value is None or (isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value))


sizes = ValueType("a list of sizes such as [3,1]", _is_sizes)
span = ValueType("[least,most] such as [2,5]", _is_range)
paths = ValueType("a list of files such as [a.npz,b.npz], or null", _is_paths)
finite = ValueType("a number", lambda value: type(value) in (int, float) and math.isfinite(value))
switch = ValueType("true or false", lambda value: type(value) is bool)
text = ValueType("a text (digits as \"'7'\")", lambda value: isinstance(value, str))
component = ValueType(
    "a mapping with a _target_", lambda value: isinstance(value, dict) and isinstance(value.get("_target_"), str)
)
components = ValueType(
    "a mapping of names to mappings with a _target_",
    lambda value: isinstance(value, dict) and all(component.accepts(part) for part in value.values()),
)


def _is_pattern(value: Any) -> bool:
    with suppress(re.error):
        return isinstance(value, str) and re.compile(value) is not None
    return False


def _are_rates(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(_is_pattern(name) and numbers(0).accepts(factor) for name, factor in value)


pattern = ValueType("a regular expression", _is_pattern)
rates = ValueType("a list of names, as regular expressions, with factors, such as [[head,10]]", _are_rates)

# Keys of leaves that the frame reads: what is made of a leaf is not given them.
RESERVED_KEYS = {
    "data": {"validation": numbers(0, 1), "files": paths, "cache_on_gpu": switch | choices("auto")},
    "optimizer": {"exclude_norm_bias_decay": switch, "lr_multipliers": rates},
    "model": {"init": text | choices(None), "freeze": pattern | choices(None)},
}


def target_arguments(key: str, component: ComponentConfig) -> ComponentConfig:
    """The leaf without the keys that the frame reads."""
    return {name: value for name, value in component.items() if name not in RESERVED_KEYS.get(key, ())}


def typed_overrides(key: str, component: ComponentConfig) -> str:
    """The leaf's values as they are typed, as a line of a message; empty when there are none."""
    values = target_arguments(key, component).items()
    typed = ", ".join(f"{key}.{name}={format_value(value)}" for name, value in values if name != "_target_")
    return f"\n  given: {typed}" if typed else ""


def typed_field(value_type: ValueType) -> Any:
    """A dataclass field that holds a value of this kind."""
    return field(metadata={"kind": value_type})


@dataclass(frozen=True)
class RoundConfig:
    epochs: int | list[int] = typed_field(integers(1) | span)
    steps: int | None = typed_field(integers(1) | choices(None))
    sync_rounds: int = typed_field(integers(0))
    deadline_seconds: float | None = typed_field(numbers(0) | choices(None))
    stragglers: Literal["keep", "drop"] = typed_field(choices("keep", "drop"))


@dataclass(frozen=True)
class ClipConfig:
    max_norm: float | None = typed_field(numbers(1e-12) | choices(None))
    norm_type: float = typed_field(choices(1, 2, math.inf))
    max_value: float | None = typed_field(numbers(1e-12) | choices(None))


@dataclass(frozen=True)
class StopConfig:
    metric_target: float | None = typed_field(finite | choices(None))
    patience_evaluations: int | None = typed_field(integers(1) | choices(None))
    max_training_seconds: float | None = typed_field(numbers(0) | choices(None))


@dataclass(frozen=True)
class EvalConfig:
    every_rounds: int = typed_field(integers(1))
    batch_size: int = typed_field(integers(1))
    personal_steps: int = typed_field(integers(0))


@dataclass(frozen=True)
class CheckpointConfig:
    every_rounds: int = typed_field(integers(1))
    every_seconds: float | None = typed_field(numbers(0) | choices(None))
    keep_last: int = typed_field(integers(1))


@dataclass(frozen=True)
class MetricsConfig:
    per_client: Literal["full", "scores", "none"] = typed_field(choices("full", "scores", "none"))
    peak_flops: float | str = typed_field(numbers(1) | choices("auto"))
    measure_flops: bool | str = typed_field(switch | choices("auto"))


@dataclass(frozen=True)
class RunConfig:
    smoke: bool = typed_field(switch)
    profile: bool = typed_field(switch)


@dataclass(frozen=True)
class PrecisionConfig:
    autocast: str | None = typed_field(choices("bfloat16", "float16", None))
    tf32: bool = typed_field(switch)


@dataclass(frozen=True)
class LaunchConfig:
    nproc_per_node: int | str = typed_field(integers(1) | choices("auto"))
    nodes: int | list[int] = typed_field(integers(1) | span)
    rdzv_endpoint: str | None = typed_field(text | choices(None))
    threads_per_worker: int | str = typed_field(integers(1) | choices("auto"))
    device: str = typed_field(choices("auto", "cpu", "cuda"))
    max_restarts: int = typed_field(integers(0))
    max_seconds: float | None = typed_field(numbers(0) | choices(None))
    silo_timeout_seconds: float = typed_field(numbers(1))
    inter_silo_timeout_seconds: float = typed_field(numbers(1))
    backend: str = typed_field(choices("auto", "gloo", "nccl"))
    inter_silo_backend: str = typed_field(choices("auto", "gloo", "nccl"))


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
    name: str | None = typed_field(text | choices(None))
    seed: int = typed_field(integers(0))
    rounds: int = typed_field(integers(1))
    silos: int | str | list[int] = typed_field(integers(1) | sizes | choices("node"))
    clients: int | str = typed_field(integers(1) | choices("auto"))
    batch_size: int | str = typed_field(integers(1) | choices("all"))
    micro_batch_size: int | Literal["auto"] | None = typed_field(integers(1) | choices("auto", None))
    ema_decay: float | None = typed_field(numbers(0, 1) | choices(None))
    max_nonfinite_rounds: int = typed_field(integers(1))
    on_nonfinite_loss: str = typed_field(choices("stop", "skip"))
    deterministic: bool = typed_field(switch)
    compile_backend: str | None = typed_field(choices("inductor", "aot_eager", None))
    channels_last: bool = typed_field(switch)
    objective: str | None = typed_field(text | choices(None))
    run_dir: str | None = typed_field(text | choices(None))
    require_shared_run_dir: bool = typed_field(switch)
    resume: str = typed_field(text)
    data: ComponentConfig = typed_field(component)
    client_shift: dict[str, ComponentConfig] = typed_field(components)
    transforms: dict[str, ComponentConfig] = typed_field(components)
    loggers: dict[str, ComponentConfig] = typed_field(components)
    model: ComponentConfig = typed_field(component)
    task: ComponentConfig = typed_field(component)
    optimizer: ComponentConfig = typed_field(component)
    schedule: ComponentConfig = typed_field(component)
    server: ComponentConfig = typed_field(component)
    update_compression: ComponentConfig = typed_field(component)
    partition: ComponentConfig = typed_field(component)
    client_sampling: ComponentConfig = typed_field(component)
    gradient_compression: ComponentConfig = typed_field(component)
    algorithm: ComponentConfig = typed_field(component)


def read_config(values: Mapping[str, Any]) -> Config:
    """The Config that a resolved tree of plain values describes; ValueError names every fault."""
    errors: list[str] = []
    config = _read(Config, values, "", errors)
    for key, kinds in RESERVED_KEYS.items():
        own = values[key] if isinstance(values.get(key), Mapping) else {}
        wrong = {name: kind for name, kind in kinds.items() if name in own and not kind.accepts(own[name])}
        errors += [f"{key}.{name}={format_value(own[name])}\n  valid: {kind.valid}" for name, kind in wrong.items()]
    if errors:
        raise ValueError("\n".join(errors))
    return config


def _read(kind: type, values: Mapping[str, Any], prefix: str, errors: list[str]) -> Any:
    known = {item.name: item for item in fields(kind)}
    valid = [prefix + name for name in known]
    unknown = [prefix + name for name in values if name not in known]
    errors += [f"{name} is no key of the configuration{suggest(name, valid)}" for name in unknown]
    hints = get_type_hints(kind)
    read: dict[str, Any] = {}
    for name, item in known.items():
        value = values.get(name)
        if is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                read[name] = _read(hints[name], value, f"{prefix}{name}.", errors)
            else:
                keys = ", ".join(f"{prefix}{name}.{item.name}" for item in fields(hints[name]))
                errors.append(f"{prefix}{name}={format_value(value)}\n  valid: {keys}")
            continue
        if not item.metadata["kind"].accepts(value):
            errors.append(f"{prefix}{name}={format_value(value)}\n  valid: {item.metadata['kind'].valid}")
        read[name] = value
    return None if errors else kind(**read)
