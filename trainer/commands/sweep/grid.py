"""Values of a sweep's overrides, as Hydra's sweepers read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from trainer.commands.sweep import hydra_plugins

Overrides = tuple[str, ...]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra; of several for one key, the last counts."""
    parser = OverridesParser.create(config_loader=hydra_plugins.hydra_context().config_loader)
    parsed = parser.parse_overrides(list(overrides))
    return list({override.get_key_element(): override for override in parsed}.values())


def values(override: Override) -> list[str]:
    """Return an override for each value of this one; of an interval, for its ends."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in dict.fromkeys((value.start, value.end))]
    if override.is_sweep_override():
        return [f"{key}={text}" for text in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def product(overrides: Sequence[Override]) -> list[Overrides]:
    """Return all combinations of the values, in the order of Hydra's basic sweeper."""
    return list(itertools.product(*map(values, overrides)))


def edges(overrides: Sequence[Override]) -> list[Overrides]:
    """Return a few combinations in which each value occurs at least once."""
    lists = [values(override) for override in overrides]
    longest = max(map(len, lists), default=1)
    return [tuple(texts[min(index, len(texts) - 1)] for texts in lists) for index in range(longest)]
