"""Fashion-MNIST, 10 clients of Dirichlet(0.1), 2NN: every algorithm between its two baselines.

50 rounds of one local epoch with batch size 64, the same three learning rates for all, other settings as in conf/. The
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
    """Return the runs of the table."""
    return [trial for name in ROWS for seed in seeds for trial in _cell(name, seed)]


def _cell(name: str, seed: int) -> Iterator[Trial]:
    overrides = ("experiment=fashion_dirichlet", f"algorithm={name}", "silos=1")
    for lr in LEARNING_RATES:
        yield Trial(name, lr, seed, overrides)


def text(series: Series) -> str:
    """Return the accuracies in percent over the last five rounds: mean and standard deviation over the seeds."""
    alone = ["alone, on all test examples (lower baseline)", *_texts(series, "local", accuracy_on_all)[:2], "–"]
    others = [[name, *_texts(series, name)] for name in FEDERATED]
    pooled = ["pooled data (upper baseline)", *_texts(series, "sync")]
    own = ["alone, each on its own kind of examples", *_texts(series, "local")]
    return table(["algorithm", "lr", "test accuracy", "worst client"], [alone, *others, pooled, own])


def _own_kind(folder: Path) -> float:
    """Return the accuracy over all clients' test examples; with one model for all that is the whole test set."""
    return final(folder, "test/accuracy")


def _texts(series: Series, name: str, accuracy: Callable[[Path], float] = _own_kind) -> list[str]:
    """Return the learning rate and the accuracies of a row; dashes until its trials have ended."""
    if not (chosen := chosen_trials(series, name)):
        return ["–", "–", "–"]
    folders = [series.of(trial) for trial in chosen]
    worst = spread([final(folder, "clients/worst_accuracy") for folder in folders])
    return [f"{chosen[0].lr:g}", spread([accuracy(folder) for folder in folders]), worst]


def chosen_trials(series: Series, name: str) -> list[Trial]:
    """Return a trial a seed, at the learning rate of the highest validation accuracy; none until all have ended."""
    mine = [trial for trial in series.trials if trial.cell == name]
    if not mine or not all(series.is_over(trial) for trial in mine):
        return []

    best = max(LEARNING_RATES, key=lambda lr: _validation(series, [trial for trial in mine if trial.lr == lr]))
    return [trial for trial in mine if trial.lr == best]


def _validation(series: Series, trials: Sequence[Trial]) -> float:
    """Return the mean validation accuracy at the end; a trial that diverged is worse than all others."""
    if any(series.has_diverged(trial) for trial in trials):
        return -math.inf
    return mean(final(series.of(trial), "validation/accuracy") for trial in trials)


def figures(series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Return the curves at the chosen learning rates, as arguments of scripts.reproduce.plot."""
    chosen = [trial for name in (*FEDERATED, "sync") for trial in chosen_trials(series, name)]
    return {"fashion_dirichlet.png": [f"{trial.cell}={series.of(trial)}" for trial in chosen]}
