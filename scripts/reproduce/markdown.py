"""Tables as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from scripts.reproduce.trials import Series


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is aligned to the left, the others, numbers, to the right."""
    assert all(len(row) == len(head) for row in rows), "every row has a cell for every column"
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def rounds_of(series: Series, cell: str) -> str:
    """Return the fewest rounds to the target and their learning rate, for each seed of a cell: 208 (0.1).

    >200 if no learning rate reached it in that many rounds; a dash for a cell that is left out or unfinished.
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
    """Return mean and standard deviation in a unit, by default percent: 84.3 ± 0.4. One value has no deviation."""
    deviation = f" ± {stdev(values) / unit:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values) / unit:.{digits}f}{deviation}"
