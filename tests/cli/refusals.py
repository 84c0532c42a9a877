"""Errors of overrides that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.silos import silo_sizes
from trainer.distributed.topology import Topology


def composing(overrides: list[str]) -> str:
    """Return the error of composing these overrides."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (callers check the message)
        compose_tree(overrides)
    return str(refusal.value)


def building(overrides: list[str], topology: Topology) -> str:
    """Return the error of composing the run, or else of building it for the ranks that `silos` needs."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (callers check the message)
        _build(overrides, topology)
    return str(refusal.value)


def _build(overrides: list[str], topology: Topology) -> None:
    config = read_config(compose_tree(overrides))
    assert not isinstance(config.silos, str)
    sizes = silo_sizes(config.silos, [0] * (sum(config.silos) if isinstance(config.silos, list) else config.silos))
    build(config, replace(topology, silo_sizes=sizes))


def assert_says(message: str, parts: list[str]) -> None:
    """Assert that the message contains all the parts, and no internals of the program."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    foreign = [word for word in ("Traceback", "hydra.cc", "NoneType", "not supported between") if word in message]
    assert not foreign, f"{foreign} in:\n{message}"
