"""McMahan et al. 2017 (arXiv 1602.05629) on MNIST: rounds to 97 % with the 2NN and to 99 % with the CNN, batch size 10.

Table 1 (C, with E = 1), Table 4 of the appendix (E, with C = 0.1) and, for the CNN, Table 2 without its shards, which
would take hours. Plain SGD; the learning rate of each cell is the best of those in ROWS, fewer for long runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.reproduce.markdown import rounds_of, table
from scripts.reproduce.trials import Series, Trial

SEEDS: tuple[int, ...] = (0,)
TARGETS = {"2nn": 0.97, "cnn": 0.99}
PARTITIONS = ("iid", "shards")

PATIENCE = 1.5  # times the published rounds: the limit of a run
MOST_EPOCHS = 60_000  # summed over the clients of a run: 40 minutes of the 2NN on a core


@dataclass(frozen=True)
class Row:
    """Clients a round out of 100, and local epochs; for both partitions the paper's rounds and our learning rates.

    The likeliest learning rate comes first: a run that reaches the target early shortens the others. None: the cell is
    left out.
    """

    model: str
    cohort: int
    epochs: int
    published: tuple[int, int]
    rates: tuple[tuple[float, ...], tuple[float, ...]]

    def cell(self, partition: str) -> str:
        return f"{self.model}-{partition}-clients{self.cohort}-epochs{self.epochs}"

    @property
    def fraction(self) -> str:
        """Return the paper's C; 0 stands for one client."""
        return "0 (1 client)" if self.cohort == 1 else f"{self.cohort / 100:g}"


ROWS = (
    Row("2nn", 1, 1, (316, 3275), ((0.1, 0.2), (0.1, 0.05))),
    Row("2nn", 10, 1, (87, 664), ((0.2, 0.4, 0.1), (0.2, 0.4, 0.1))),  # in Table 4: 92 and 831
    Row("2nn", 20, 1, (77, 619), ((0.2, 0.4, 0.1), (0.2, 0.1))),
    Row("2nn", 50, 1, (75, 443), ((0.2, 0.1), (0.2, 0.1))),
    Row("2nn", 100, 1, (70, 380), ((0.2, 0.1), (0.2, 0.1))),
    Row("2nn", 10, 10, (34, 497), ((0.2, 0.1), (0.1, 0.2))),
    Row("2nn", 10, 20, (32, 738), ((0.2, 0.1), (0.1,))),
    Row("cnn", 10, 1, (34, 350), ((0.2, 0.1), ())),
    Row("cnn", 10, 5, (20, 229), ((0.1,), ())),
)


def trials(seeds: Sequence[int]) -> list[Trial]:
    """Return the runs of the table."""
    return [trial for row in ROWS for place in range(2) for seed in seeds for trial in _cell(row, place, seed)]


def _cell(row: Row, place: int, seed: int) -> Iterator[Trial]:
    partition = PARTITIONS[place]
    rounds = min(int(PATIENCE * row.published[place]), MOST_EPOCHS // (row.cohort * row.epochs))
    overrides = (
        *(f"experiment=mcmahan_{row.model}", f"partition={partition}", "silos=1", f"rounds={rounds}"),
        *(f"client_sampling.clients_per_round={row.cohort}", f"round.epochs={row.epochs}"),
    )
    for lr in row.rates[place]:
        yield Trial(row.cell(partition), lr, seed, overrides, TARGETS[row.model])


def text(series: Series) -> str:
    """Return our rounds to the target, with their learning rates, beside the paper's."""
    head = ["model, target", "C", "E", "iid: ours (lr)", "paper", "2 shards: ours (lr)", "paper"]
    return table(head, [_texts(series, row) for row in ROWS])


def _texts(series: Series, row: Row) -> list[str]:
    cells = [f"{row.model.upper()}, {TARGETS[row.model]:.0%}", row.fraction, str(row.epochs)]
    for partition, published in zip(PARTITIONS, row.published, strict=True):
        cells += [rounds_of(series, row.cell(partition)), str(published)]
    return cells


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return the curves of the 2NN by C at the best learning rates, as arguments of scripts.reproduce.plot."""
    return {f"mcmahan_{partition}.png": _figure(series, partition, seeds[0]) for partition in PARTITIONS}


def _figure(series: Series, partition: str, seed: int) -> list[str]:
    rows = [row for row in ROWS if row.model == "2nn" and row.epochs == 1]
    leaders = [(row, series.leader(row.cell(partition), seed)) for row in rows]
    curves = [f"{partition}, C {row.fraction}={series.of(leader)}" for row, leader in leaders if leader]
    return [*curves, "--line", str(TARGETS["2nn"])]
