"""A summary of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from trainer.models.pruning import dense_sizes

MAX_ROWS = 12


class SummaryRow(NamedTuple):
    """A part of a model, with the numbers of all its parameters, of its trained ones and of its pruned weights."""

    name: str
    kind: str
    parameters: int
    trained: int
    pruned: int
    zeros: int

    @property
    def notes(self) -> str:
        """The parameters that are not trained, and the part of the pruned weights that is zero; empty without any."""
        frozen = self.parameters - self.trained
        notes = ["frozen" if frozen == self.parameters else f"{frozen:,} frozen"] if frozen else []
        notes += [f"{100 * self.zeros / self.pruned:.1f} % zero"] if self.pruned else []
        return "".join(f", {note}" for note in notes)


def describe_model(module: nn.Module) -> str:
    """Describe a model in a few lines: its class, its number of parameters, and a row for each part with parameters.

    Tied parameters count where they occur first. The numbers are those of the dense model, and what is zero for good is
    a part of the pruned weights.
    """
    sizes = dense_sizes(module)
    whole, rows = _row("", module, module.parameters(), sizes), list(_rows(module, sizes))
    lines = [f"{whole.kind}, {whole.parameters:,} parameters{whole.notes}"]
    if len(rows) > 1:
        lines += _aligned(rows[:MAX_ROWS])
    if len(rows) > MAX_ROWS:
        lines.append(f"  ... and {len(rows) - MAX_ROWS} more")
    return "\n".join(lines)


def _aligned(rows: list[SummaryRow]) -> list[str]:
    name_width = max(len(row.name) for row in rows)
    count_width = max(len(f"{row.parameters:,}") for row in rows)
    return [f"  {row.name:<{name_width}}  {row.parameters:>{count_width},}  {row.kind}{row.notes}" for row in rows]


def _rows(module: nn.Module, sizes: Mapping[int, int]) -> Iterator[SummaryRow]:
    """Yield a row for each direct parameter and child of the module, descending while there is only one child."""
    prefix = ""
    while not module._parameters and len(children := list(module.named_children())) == 1:
        ((name, module),) = children
        prefix += f"{name}."
    seen: set[int] = set()
    for name, parameter in module.named_parameters(recurse=False):
        seen.add(id(parameter))
        if sizes[id(parameter)]:
            yield _row(prefix + name, parameter, [parameter], sizes)
    for name, child in module.named_children():
        new = [parameter for parameter in child.parameters() if id(parameter) not in seen]
        seen |= set(map(id, new))
        if new:
            yield _row(prefix + name, child, new, sizes)


def _row(
    name: str, part: nn.Module | nn.Parameter, parameters: Iterable[nn.Parameter], sizes: Mapping[int, int]
) -> SummaryRow:
    counted = [(sizes[id(parameter)], parameter) for parameter in parameters]
    pruned = [(size, size - parameter.numel()) for size, parameter in counted if size > parameter.numel()]
    return SummaryRow(
        name,
        type(part).__name__,
        parameters=sum(size for size, _ in counted),
        trained=sum(size for size, parameter in counted if parameter.requires_grad),
        pruned=sum(size for size, _ in pruned),
        zeros=sum(zeros for _, zeros in pruned),
    )
