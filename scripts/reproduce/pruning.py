"""Pruned models: parts of the weights of a trained model become zero, and the rest trains for a few rounds more.

Synchronously, or by FedAvg. Beside them are the dense model, and the dense model after the same rounds more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.reproduce.curves import final
from scripts.reproduce.markdown import spread, table
from scripts.reproduce.trials import Series, Trial

ZEROS = (None, 0.9, 0.95, 0.98)  # parts of the weights; None: the dense model trains on
COMMON = ("optimizer=momentum", "schedule=cosine", "metrics.per_client=none")
DENSE_LR, LR = 0.05, 0.02


@dataclass(frozen=True)
class PruningTable:
    """The table of a data set.

    Attributes:
        of_all: overrides of all runs.
        of_fedavg: those of the federated ones.
        dense_rounds: the rounds of the dense model.
        rounds: those after pruning.
        SEEDS: of the dense models, each of which is pruned.
    """

    of_all: tuple[str, ...]
    of_fedavg: tuple[str, ...]
    dense_rounds: int
    rounds: int
    SEEDS: tuple[int, ...] = (0, 1, 2)

    def trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Return the runs of the table, the dense ones first."""
        of_all = (*self.of_all, *COMMON)
        dense = [Trial("dense", DENSE_LR, seed, (*of_all, f"rounds={self.dense_rounds}")) for seed in seeds]
        return [*dense, *(trial for before in dense for trial in self._pruned(before, of_all))]

    def _pruned(self, dense: Trial, of_all: tuple[str, ...]) -> Iterator[Trial]:
        ways = {"sync": (), "fedavg": ("algorithm=fedavg", *self.of_fedavg)}
        for zeros in ZEROS:
            for way, overrides in ways.items():
                own = (*of_all, *overrides, f"rounds={self.rounds}", f"model.prune={zeros or 'null'}")
                yield Trial(_cell(way, zeros), LR, dense.seed, own, init=dense.name)

    def text(self, series: Series) -> str:
        """Return test accuracies in percent, mean and standard deviation over the seeds, and sizes of weights."""
        dense = _folders(series, "dense")
        rows = [["none, as it was", _accuracy(dense), "–", "1.00" if dense else "–"]]
        for zeros in ZEROS:
            sync, fedavg = (_folders(series, _cell(way, zeros)) for way in ("sync", "fedavg"))
            part = "none" if zeros is None else f"{zeros * 100:g} %"
            rows.append([part, _accuracy(sync), _accuracy(fedavg), _sizes(sync, dense)])
        return table(["zero", "synchronous", "FedAvg", "deflated weights"], rows)

    def figures(self, series: Series, seeds: Sequence[int]) -> dict[str, list[str]]:
        """Return no pictures."""
        return {}


def _cell(way: str, zeros: float | None) -> str:
    return f"{way}-{zeros or 'none'}"


def _folders(series: Series, cell: str) -> list[Path]:
    """Return the folders of a cell's runs by seed; none until all have ended."""
    trials = [trial for trial in series.trials if trial.cell == cell]
    return [series.of(trial) for trial in trials] if all(map(series.is_over, trials)) else []


def _accuracy(folders: Sequence[Path]) -> str:
    return spread([final(folder, "test/accuracy", last=1) for folder in folders], digits=2) if folders else "–"


def _sizes(folders: Sequence[Path], dense: Sequence[Path]) -> str:
    """Return the bytes of the deflated weights, over those of the dense models."""
    if not folders or not dense:
        return "–"
    return f"{sum(map(_deflated, folders)) / sum(map(_deflated, dense)):.2f}"


def _deflated(folder: Path) -> int:
    return len(zlib.compress((folder / "model.safetensors").read_bytes(), 9))


def _of_images(data: str) -> PruningTable:
    return PruningTable(
        of_all=(f"data={data}", "model=mlp", "batch_size=64", "data.validation=0"),
        of_fedavg=("clients=10", "partition=dirichlet", "partition.alpha=1"),
        dense_rounds=10,
        rounds=5,
    )


DIGITS = PruningTable(of_all=("data=digits",), of_fedavg=("clients=2",), dense_rounds=30, rounds=3)
MNIST, FASHION = _of_images("mnist"), _of_images("fashion_mnist")
