"""Reproduce a published table, and print our numbers beside the published ones.

    python -m scripts.reproduce TABLE --data FOLDER

The runs are in --out, a folder each. Unfinished ones are run, --jobs workers at a time; after an interruption the same
command continues. Then the table is printed as markdown, with the results so far. When it is complete, its curves are
drawn in docs/images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from scripts.reproduce import diloco, distillation, fashion, mcmahan, pruning, scaffold
from scripts.reproduce.series import Runner
from scripts.reproduce.trials import Series, Trial

IMAGES = Path(__file__).parents[2] / "docs" / "images"


class Table(Protocol):
    """The module of a table, or one of several such tables. Abstract."""

    @property
    def SEEDS(self) -> tuple[int, ...]:  # noqa: N802 (a constant of a module)
        """Return the seeds of its runs."""
        ...

    def trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Return the runs of the table."""
        ...

    def text(self, series: Series) -> str:
        """Return the table, with dashes where runs are missing."""
        ...

    def figures(self, series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
        """Return the arguments of scripts.reproduce.plot by the name of the picture."""
        ...


TABLES: dict[str, Table] = {
    "mcmahan": mcmahan,
    "scaffold": scaffold,
    "fashion": fashion,
    "diloco": diloco,
    "distil_digits": distillation.DIGITS,
    "distil_mnist": distillation.MNIST,
    "distil_fashion": distillation.FASHION,
    "pruning_digits": pruning.DIGITS,
    "pruning_mnist": pruning.MNIST,
    "pruning_fashion": pruning.FASHION,
}
DIGITS = "the digits come with scikit-learn"
PACKAGED = {"diloco": "Shakespeare comes with a package", "distil_digits": DIGITS, "pruning_digits": DIGITS}


def main() -> int:
    """Return 0 if all requested runs are finished."""
    options = _options()
    table = TABLES[options.table]
    seeds = options.seeds or table.SEEDS
    data = (f"data.root={options.data.resolve()}",) if options.data else ()
    trials = [replace(trial, overrides=(*trial.overrides, *data)) for trial in table.trials(seeds)]
    series = Series(trials, options.out / options.table)
    failed = [] if options.show else Runner(series, options.only, options.jobs).run()
    print(f"\n{table.text(series)}\n", *failed, sep="\n", flush=True)
    if all(map(series.is_over, trials)):
        draw(table.figures(series, seeds))
    return 1 if failed else 0


def draw(figures: dict[str, list[str]]) -> None:
    """Draw each picture, and print where it is."""
    for name, arguments in figures.items():
        subprocess.run([sys.executable, "-m", "scripts.reproduce.plot", str(IMAGES / name), *arguments], check=True)
        print(IMAGES / name, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, help="the folder of MNIST or Fashion-MNIST; by default that of conf/data")
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence"), help="the runs' folders")
    parser.add_argument("--jobs", type=int, default=2, help="workers at a time, each of one thread")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the table")
    parser.add_argument("--only", default="", help="run only those whose names contain this")
    parser.add_argument("--show", action="store_true", help="run nothing, and print the table")
    options = parser.parse_args()
    if options.data and options.table in PACKAGED:
        parser.error(f"--data has no effect on {options.table}: {PACKAGED[options.table]}")
    return options


if __name__ == "__main__":
    sys.exit(main())
