"""A summary of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

MAX_ROWS = 12


class SummaryRow(NamedTuple):
    """A part of a model, with the numbers of all its parameters and of its trained ones."""

    name: str
    kind: str
    parameters: int
    trained: int

    @property
    def frozen(self) -> str:
        """A note on the parameters that are not trained; empty if all are."""
        if self.trained == self.parameters:
            return ""
        return f", {self.parameters - self.trained:,} frozen" if self.trained else ", frozen"


def describe_model(module: nn.Module) -> str:
    """Describe a model in a few lines: its class, its number of parameters, and a row for each part with parameters.

    Tied parameters count where they occur first.
    """
    whole, rows = _row("", module, module.parameters()), list(_rows(module))
    lines = [f"{whole.kind}, {whole.parameters:,} parameters{whole.frozen}"]
    if len(rows) > 1:
        lines += _aligned(rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        lines.append(f"  ... and {len(rows) - MAX_ROWS} more")
    return "\n".join(lines)


def _aligned(rows: list[SummaryRow]) -> list[str]:
    name_width = max(len(row.name) for row in rows)
    count_width = max(len(f"{row.parameters:,}") for row in rows)
    return [f"  {row.name:<{name_width}}  {row.parameters:>{count_width},}  {row.kind}{row.frozen}" for row in rows]


def _rows(module: nn.Module) -> Iterator[SummaryRow]:
    """Yield a row for each direct parameter and child of the module, descending while there is only one child."""
    prefix = ""
    while not module._parameters and len(children := list(module.named_children())) == 1:
        ((name, module),) = children
        prefix += f"{name}."
    seen: set[int] = set()
    for name, parameter in module.named_parameters(recurse=False):
        seen.add(id(parameter))
        yield _row(prefix + name, parameter, [parameter])
    for name, child in module.named_children():
        new = [parameter for parameter in child.parameters() if id(parameter) not in seen]
        seen |= set(map(id, new))
        if new:
            yield _row(prefix + name, child, new)


def _row(name: str, part: nn.Module | nn.Parameter, parameters: Iterable[nn.Parameter]) -> SummaryRow:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return SummaryRow(name, type(part).__name__, sum(size for size, _ in sizes), trained)
