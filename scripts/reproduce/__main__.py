"""Runs a published table again, and prints ours beside theirs: python -m scripts.reproduce TABLE --data FOLDER

The runs lie in --out, one folder each. Those that are not over are run, --jobs workers at a time; when this is
interrupted, the same command goes on. Then the table is printed as markdown with what is there, and when all of it is
there its curves are drawn in docs/images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from scripts.reproduce import diloco, fashion, mcmahan, scaffold
from scripts.reproduce.series import Runner
from scripts.reproduce.trials import Series, Trial

IMAGES = Path(__file__).parents[2] / "docs" / "images"


class Table(Protocol):
    """Abstract: the module of a table."""

    SEEDS: tuple[int, ...]

    def trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Its runs."""
        ...

    def text(self, series: Series) -> str:
        """The table, with a dash where runs are missing."""
        ...

    def figures(self, series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
        """The arguments of scripts.reproduce.plot by the name of the picture."""
        ...


TABLES: dict[str, Table] = {"mcmahan": mcmahan, "scaffold": scaffold, "fashion": fashion, "diloco": diloco}


def main() -> int:
    """0 when all runs that were asked for are over."""
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
    """Draws each picture, and says where it is."""
    for name, arguments in figures.items():
        subprocess.run([sys.executable, "-m", "scripts.reproduce.plot", str(IMAGES / name), *arguments], check=True)
        print(IMAGES / name, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, help="the folder of MNIST or Fashion-MNIST; else where conf/data says")
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence"), help="the runs' folders")
    parser.add_argument("--jobs", type=int, default=2, help="workers at a time, each of one thread")
    parser.add_argument("--seeds", type=int, nargs="+", help="else those that the table is made of")
    parser.add_argument("--only", default="", help="runs whose names contain this; the table shows all that are there")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.data and options.table == "diloco":
        parser.error("--data has no effect on diloco: Shakespeare comes with a package")
    return options


if __name__ == "__main__":
    sys.exit(main())
