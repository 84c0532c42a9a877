"""Tables as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from scripts.reproduce.trials import Series


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is read from the left, the others, numbers, from the right."""
    assert all(len(row) == len(head) for row in rows), "every row has a cell for every column"
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def rounds_of(series: Series, cell: str) -> str:
    """The fewest rounds to the target and their learning rate, a cell of a table for every seed: 208 (0.1).

    >200 when no learning rate got there in so many rounds; a dash for a cell that was left out or is not at its end.
    """
    seeds = dict.fromkeys(trial.seed for trial in series.trials if trial.cell == cell)
    return ", ".join(_rounds_of_seed(series, cell, seed) for seed in seeds) or "–"


def _rounds_of_seed(series: Series, cell: str, seed: int) -> str:
    mine = series.of_cell(cell, seed)
    if not all(series.is_over(trial) for trial in mine):
        return "–"
    if best := series.best(cell, seed):
        return f"{series.rounds(best):.0f} ({best.lr:g})"
    return f">{max(series.rounds_done(trial) for trial in mine)}"


def spread(values: Sequence[float], unit: float = 0.01, digits: int = 1) -> str:
    """Mean and standard deviation in a unit, by default percent: 84.3 ± 0.4; without a deviation if there is one."""
    deviation = f" ± {stdev(values) / unit:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values) / unit:.{digits}f}{deviation}"
