"""The units of a module: the submodules whose parameters are gathered together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from torch import nn


def find_units(module: nn.Module, choice: Literal["auto"] | re.Pattern[str]) -> list[nn.Module]:
    """Return the units of a module, inner ones before those around them. What is in none of them is a unit more.

    Args:
        module: the model.
        choice: `auto` for the members of every ModuleList and Sequential that have parameters, outermost alone; or the
            names of the units.
    """
    return (
        list(_automatic(module))
        if choice == "auto"
        else [m for name, m in module.named_modules() if choice.search(name)]
    )


def _automatic(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield from (member for member in module.children() if any(True for _ in member.parameters()))
    else:
        for child in module.children():
            yield from _automatic(child)
