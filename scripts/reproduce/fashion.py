"""Fashion-MNIST, 10 clients of Dirichlet(0.1), 2NN: every algorithm on the same ground, between its two brackets.

50 rounds of one local epoch, batch 64, the same three learning rates for all, the other settings those of conf/. The
learning rate is chosen by the validation examples, a tenth of each client's training set, and never by the test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from scripts.reproduce.alone import accuracy_on_all
from scripts.reproduce.curves import final
from scripts.reproduce.markdown import spread, table
from scripts.reproduce.trials import Series, Trial

SEEDS: tuple[int, ...] = (0, 1, 2)
LEARNING_RATES = (0.01, 0.03, 0.1)
FEDERATED = ("fedavg", "fedprox", "scaffold", "fednova", "fedavgm", "fedadagrad", "fedadam", "fedyogi")
ROWS = ("local", *FEDERATED, "sync")


def trials(seeds: Sequence[int]) -> list[Trial]:
    """The runs of the table."""
    return [trial for name in ROWS for seed in seeds for trial in _cell(name, seed)]


def _cell(name: str, seed: int) -> Iterator[Trial]:
    overrides = ("experiment=fashion_dirichlet", f"algorithm={name}", "silos=1")
    for lr in LEARNING_RATES:
        yield Trial(name, lr, seed, overrides)


def text(series: Series) -> str:
    """The accuracies, in percent, over the last five rounds: mean and standard deviation of the seeds."""
    alone = ["alone, on all test examples (lower bracket)", *_texts(series, "local", accuracy_on_all)[:2], "–"]
    others = [[name, *_texts(series, name)] for name in FEDERATED]
    pooled = ["pooled data (upper bracket)", *_texts(series, "sync")]
    own = ["alone, each on its own kind of examples", *_texts(series, "local")]
    return table(["algorithm", "lr", "test accuracy", "worst client"], [alone, *others, pooled, own])


def _own_kind(folder: Path) -> float:
    """Of every client's test examples, judged by its model; with one model for all that is the whole test set."""
    return final(folder, "test/accuracy")


def _texts(series: Series, name: str, accuracy: Callable[[Path], float] = _own_kind) -> list[str]:
    """The learning rate, and the accuracies of a row; dashes until its trials are over."""
    if not (chosen := chosen_trials(series, name)):
        return ["–", "–", "–"]
    folders = [series.of(trial) for trial in chosen]
    worst = spread([final(folder, "clients/worst_accuracy") for folder in folders])
    return [f"{chosen[0].lr:g}", spread([accuracy(folder) for folder in folders]), worst]


def chosen_trials(series: Series, name: str) -> list[Trial]:
    """The trials, one a seed, at the learning rate of the highest validation accuracy; none until all are over."""
    mine = [trial for trial in series.trials if trial.cell == name]
    if not mine or not all(series.is_over(trial) for trial in mine):
        return []

    best = max(LEARNING_RATES, key=lambda lr: _validation(series, [trial for trial in mine if trial.lr == lr]))
    return [trial for trial in mine if trial.lr == best]


def _validation(series: Series, trials: Sequence[Trial]) -> float:
    """The mean validation accuracy at the end; nothing is worse than a trial that diverged."""
    if any(series.has_diverged(trial) for trial in trials):
        return -math.inf
    return mean(final(series.of(trial), "validation/accuracy") for trial in trials)


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """The curves at the chosen learning rates, as arguments of scripts.reproduce.plot by the name of the picture."""
    chosen = [trial for name in (*FEDERATED, "sync") for trial in chosen_trials(series, name)]
    return {"fashion_dirichlet.png": [f"{trial.cell}={series.of(trial)}" for trial in chosen]}
