"""The grid of SCAFFOLD's Table 3 (Karimireddy et al. 2020, arXiv 1910.06378), on MNIST instead of EMNIST.

Logistic regression, 100 clients, 20 of them a round. A part of the data is distributed at random, the rest sorted by
label. A local epoch has 5 steps; SGD takes one step a round, on all examples of the round's clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.reproduce.markdown import rounds_of, table
from scripts.reproduce.trials import Series, Trial

SEEDS: tuple[int, ...] = (0,)
LEARNING_RATES = (0.3, 1.0, 0.1)  # the likeliest comes first
# Test accuracy: the highest multiple of 5 % that SGD reaches within 200 rounds in short runs, for any similarity.
TARGET = 0.9
SIMILARITIES = (0, 10, 100)  # percent
EPOCHS = (1, 5, 10, 20)

ALGORITHMS = {
    "SGD": ("algorithm=fedsgd", "batch_size=all"),
    "FedAvg": ("algorithm=fedavg",),
    "FedProx": ("algorithm=fedprox", "algorithm.proximal_mu=1"),
    "SCAFFOLD": ("algorithm=scaffold",),
}

# Rounds to 50 % on EMNIST, by similarity.
PUBLISHED = {
    ("SGD", 1): ("317", "365", "416"),
    ("SCAFFOLD", 1): ("77", "62", "60"),
    ("SCAFFOLD", 5): ("152", "20", "10"),
    ("SCAFFOLD", 10): ("286", "16", "7"),
    ("SCAFFOLD", 20): ("266", "11", "4"),
    ("FedAvg", 1): ("258", "74", "83"),
    ("FedAvg", 5): ("428", "34", "10"),
    ("FedAvg", 10): ("711", "25", "6"),
    ("FedAvg", 20): (">1000", "18", "4"),
    ("FedProx", 1): (">1000", "979", "459"),
    ("FedProx", 5): (">1000", "794", "351"),
    ("FedProx", 10): (">1000", "894", "308"),
    ("FedProx", 20): (">1000", "916", "351"),
}
ROWS = tuple((name, epochs) for name in ALGORITHMS for epochs in EPOCHS if (name, epochs) in PUBLISHED)


def trials(seeds: Sequence[int]) -> list[Trial]:
    """Return the runs of the table."""
    return [
        trial
        for name, epochs in ROWS
        for similarity in SIMILARITIES
        for seed in seeds
        for trial in _cell(name, epochs, similarity, seed)
    ]


def _cell(name: str, epochs: int, similarity: int, seed: int) -> Iterator[Trial]:
    overrides = (
        *("experiment=scaffold_mnist", *ALGORITHMS[name], "silos=1"),
        *(f"round.epochs={epochs}", f"partition.similarity={similarity / 100:g}"),
    )
    for lr in LEARNING_RATES:
        yield Trial(cell_of(name, epochs, similarity), lr, seed, overrides, TARGET)


def cell_of(name: str, epochs: int, similarity: int) -> str:
    """Return the name of a cell."""
    return f"{name.lower()}-epochs{epochs}-similar{similarity}"


def text(series: Series) -> str:
    """Return our rounds to the target, with their learning rates, beside the paper's on EMNIST."""
    head = ["algorithm", "epochs", *(part for s in SIMILARITIES for part in (f"{s} %: ours (lr)", "paper, EMNIST"))]
    return table(head, [_texts(series, name, epochs) for name, epochs in ROWS])


def _texts(series: Series, name: str, epochs: int) -> list[str]:
    cells = [name, str(epochs)]
    for similarity, published in zip(SIMILARITIES, PUBLISHED[name, epochs], strict=True):
        cells += [rounds_of(series, cell_of(name, epochs, similarity)), published]
    return cells


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return the curves of 0 % similarity at the best learning rates, as arguments of scripts.reproduce.plot."""
    return {f"scaffold_epochs{epochs}.png": _figure(series, epochs, seeds[0]) for epochs in (1, 10)}


def _figure(series: Series, epochs: int, seed: int) -> list[str]:
    names = [name for name, others in ROWS if others == epochs]
    leaders = [(name, series.leader(cell_of(name, epochs, 0), seed)) for name in names]
    return [*(f"{name}={series.of(leader)}" for name, leader in leaders if leader), "--line", str(TARGET)]
