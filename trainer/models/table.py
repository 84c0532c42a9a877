"""What a model consists of, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

MOST_ROWS = 12

Row = tuple[str, str, int, int]  # name, kind, parameters, and those of them that are trained


def describe_model(module: nn.Module) -> str:
    """The model's kind and number of parameters, and a row for each of its parts that has any.

    Tied parameters are counted where they come first.
    """
    rows = list(_rows(module))
    total, trained = (sum(row[place] for row in rows) for place in (2, 3))
    lines = [f"{type(module).__name__}, {total:,} parameters" + _frozen(total, trained)]
    shown = rows[:MOST_ROWS] if len(rows) > 1 else []
    widths = [max((len(text) for text in column), default=0) for column in ([r[0] for r in shown], _counts(shown))]
    for (name, kind, count, own), said in zip(shown, _counts(shown), strict=True):
        lines.append(f"  {name.ljust(widths[0])}  {said.rjust(widths[1])}  {kind}{_frozen(count, own)}")
    if len(shown) < len(rows) and shown:
        lines.append(f"  ... and {len(rows) - len(shown)} more")
    return "\n".join(lines)


def _rows(module: nn.Module) -> Iterator[Row]:
    prefix = ""
    while not module._parameters and len(children := dict(module.named_children())) == 1:
        ((name, module),) = children.items()
        prefix += f"{name}."
    seen: set[int] = set()
    for name, parameter in module.named_parameters(recurse=False):
        seen.add(id(parameter))
        yield prefix + name, "Parameter", parameter.numel(), parameter.numel() * parameter.requires_grad
    for name, child in module.named_children():
        new = {id(parameter): parameter for parameter in child.parameters() if id(parameter) not in seen}
        seen |= set(new)
        if new:
            trained = sum(parameter.numel() for parameter in new.values() if parameter.requires_grad)
            yield prefix + name, type(child).__name__, sum(p.numel() for p in new.values()), trained


def _counts(rows: list[Row]) -> list[str]:
    return [f"{count:,}" for _, _, count, _ in rows]


def _frozen(total: int, trained: int) -> str:
    if trained == total:
        return ""
    return ", frozen" if not trained else f", {total - trained:,} of them frozen"
