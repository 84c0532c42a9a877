"""Typed schema of the configuration: the keys that this package reads itself. Components have a `_target_`.

A new key takes a field here, or in the group of options of the loop to which it belongs, and a line in
conf/config.yaml.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trainer.config.validators import value_errors
from trainer.distributed.options import SiloOptions
from trainer.federation.options import SiteOptions
from trainer.loop.options import (
    CheckpointOptions,
    EvalOptions,
    MetricsOptions,
    RoundOptions,
    SampleOptions,
    TrainingOptions,
)
from trainer.loop.stopping import StopCriteria
from trainer.utils.annotations import OPTIONS, Count, Fraction, PositiveInt, Seconds, Span, predicate
from trainer.utils.text import format_value, suggest
from trainer.utils.trees import flatten

Timeout = Annotated[float, Field(ge=1)]
Sizes = Annotated[list[PositiveInt], Field(min_length=1, description="a list of sizes such as [3,1]")]
Files = Annotated[
    list[str] | None,
    Field(description="a list of files such as [a.npz,b.npz], or null"),
    predicate(lambda files: files != []),
]
Validation = Fraction | Annotated[int, Field(ge=2)] | Literal["auto"]  # 1 might mean all, or one example
Prune = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | Literal["2:4"] | None,
    Field(description='a number above 0 to below 1, "2:4" (a YAML file needs the quotes), or null'),
]
LrMultipliers = Annotated[
    list[tuple[re.Pattern[str], Annotated[float, Field(ge=0, allow_inf_nan=False)]]],
    Field(description="a list of names, as regular expressions, with factors, such as [[head,10]]"),
]
ComponentConfig = Annotated[
    dict[str, Any],
    Field(description="a mapping with a _target_"),
    predicate(lambda component: isinstance(component.get("_target_"), str)),
]
ComponentConfigs = Annotated[
    dict[str, ComponentConfig], Field(description="a mapping of names to mappings with a _target_")
]

# Keys of a component that are read here. They are not passed to its target.
RESERVED_KEYS: dict[str, dict[str, Any]] = {
    "data": {
        "validation": Validation,
        "files": Files,
        "cache_on_gpu": bool | Literal["auto"],
        "workers": Count,
        "prefetch_factor": PositiveInt,
        "collate_fn": str,
        "pin_memory": bool | Literal["auto"],
        "persistent_workers": bool,
    },
    "optimizer": {"exclude_norm_bias_decay": bool, "lr_multipliers": LrMultipliers},
    "task": {"output": str | int | None, "teacher": str, "teacher_weights": Literal["best", "last", "ema"]},
    "model": {"init": str | None, "freeze": re.Pattern[str] | None, "prune": Prune},
    "transforms": {"key": str | None},  # of each of them
    "adapter": {
        "targets": re.Pattern[str] | None,
        "train": Literal["both", "B"],
        "base_dtype": Literal["bfloat16", "float16", None],
        "merge": bool,
    },
}


def target_arguments(key: str, component: ComponentConfig) -> ComponentConfig:
    """Return the component without the keys that are not passed to its target."""
    reserved = RESERVED_KEYS.get(key.partition(".")[0], ())
    return {name: value for name, value in component.items() if name not in reserved}


def typed_overrides(key: str, component: ComponentConfig) -> str:
    """Format the component's values as overrides, as a line of an error message; empty when there are none."""
    values = flatten(target_arguments(key, component), f"{key}.").items()
    typed = ", ".join(f"{name}={format_value(value)}" for name, value in values if name != f"{key}._target_")
    return f"\n  given: {typed}" if typed else ""


@dataclass(frozen=True, config=OPTIONS)
class RunConfig:
    smoke: bool
    profile: bool


@dataclass(frozen=True, config=OPTIONS)
class PrecisionConfig:
    autocast: Literal["bfloat16", "float16", None]
    tf32: bool


@dataclass(frozen=True, config=OPTIONS)
class LaunchConfig:
    nproc_per_node: PositiveInt | Literal["auto"]
    nodes: PositiveInt | Span
    rdzv_endpoint: str | None
    token_file: str | None
    threads_per_worker: PositiveInt | Literal["auto"]
    device: Literal["auto", "cpu", "cuda"]
    max_restarts: Count
    max_seconds: Seconds | None
    silo_timeout_seconds: Timeout
    inter_silo_timeout_seconds: Timeout
    backend: Literal["auto", "gloo", "nccl"]
    inter_silo_backend: Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Config(TrainingOptions):
    """A resolved configuration: the training options, and those of the whole. conf/config.yaml documents each key."""

    name: str | None
    seed: Count
    rounds: PositiveInt
    silos: PositiveInt | Sizes | Literal["node"]
    clients: PositiveInt | Literal["auto"]
    on_nonfinite_loss: Literal["stop", "skip"]
    deterministic: bool
    channels_last: bool
    monitor: str | None
    objective: str | None
    run_dir: str | None
    require_shared_run_dir: bool
    resume: str
    round: RoundOptions
    stop: StopCriteria
    eval: EvalOptions
    sample: SampleOptions
    checkpoint: CheckpointOptions
    metrics: MetricsOptions
    run: RunConfig
    precision: PrecisionConfig
    launch: LaunchConfig
    silo: SiloOptions
    site: SiteOptions
    data: ComponentConfig
    client_shift: ComponentConfigs
    transforms: ComponentConfigs
    loggers: ComponentConfigs
    model: ComponentConfig
    adapter: ComponentConfig
    task: ComponentConfig
    optimizer: ComponentConfig
    schedule: ComponentConfig
    server: ComponentConfig
    update_compression: ComponentConfig
    partition: ComponentConfig
    client_sampling: ComponentConfig
    gradient_compression: ComponentConfig
    algorithm: ComponentConfig


CONFIG = TypeAdapter(Config)


def read_config(values: Mapping[str, Any]) -> Config:
    """Validate a resolved tree of plain values, and return it as a Config.

    Raises:
        ValueError: lists every error, each with its key, its value and the valid values.
    """
    config, errors = None, []
    try:
        config = CONFIG.validate_json(json.dumps(values))  # JSON for the reason given in value_errors
    except ValidationError:
        errors += _section_errors(Config, values, "")
    for key, reserved in RESERVED_KEYS.items():
        for path, given in _components(key, values.get(key)):
            for name in reserved.keys() & given.keys():
                errors += value_errors(f"{path}.{name}", given[name], reserved[name], OPTIONS)
    if config is None or errors:
        raise ValueError("\n".join(errors))
    return config


def _components(key: str, given: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a component of the configuration, or those of a group of several, with their dotted keys."""
    if isinstance(given, Mapping):
        several = {f"{key}.{name}": component for name, component in given.items() if isinstance(component, Mapping)}
        yield from ({key: given} if "_target_" in given else several).items()


def _section_errors(section: Any, values: Mapping[str, Any], prefix: str) -> list[str]:
    names = get_type_hints(section, include_extras=True)
    valid = [prefix + name for name in names]
    unknown = [prefix + name for name in values if name not in names]
    errors = [f"{key} is no key of the configuration{suggest(key, valid)}" for key in unknown]
    for name, annotation in names.items():
        key, value = prefix + name, values.get(name)
        if name not in values:
            errors.append(f"{key} has no value\n  set {key}=...")
        elif not is_dataclass(annotation):
            errors += value_errors(key, value, annotation, OPTIONS)
        elif isinstance(value, Mapping):
            errors += _section_errors(annotation, value, f"{key}.")
        else:
            keys = ", ".join(f"{key}.{name}" for name in get_type_hints(annotation))
            errors.append(f"{key}={format_value(value)}\n  valid: {keys}")
    return errors
