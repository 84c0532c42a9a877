"""Runs of a report, read from their folders as far as they got."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.checkpoint.run_dir import RunDir
from trainer.loggers import Metrics, iter_jsonl
from trainer.utils.trees import flatten

EVALUATIONS = ("test_", "global_", "personal_")  # prefixes; the other metrics of clients describe their training
ROUND_METRICS = ("client/", "slowest/", "seconds/", "delta/", "round/", "system/")  # not in result.json


class ClientMetric(NamedTuple):
    """One metric of all clients over a run.

    Attributes:
        name: the metric without its client, such as `test_accuracy`.
        clients: client numbers, ascending.
        rounds: the rounds in which the metric was measured, ascending.
        values: float64 [clients, rounds], NaN where a value is missing or not finite.
    """

    name: str
    clients: list[int]
    rounds: list[int]
    values: np.ndarray


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder records it.

    Attributes:
        folder: run folder.
        settings: resolved configuration, by dotted names.
        state: content of state.json.
        rounds: metrics of each round, without those of single clients; NaN for null.
        steps: metrics of single steps.
        clients: metrics of single clients.
        metrics: content of result.json; for an unfinished run, the latest metrics.
    """

    folder: Path
    settings: dict[str, Any]
    state: dict[str, Any]
    rounds: list[Metrics]
    steps: list[Metrics]
    clients: list[ClientMetric]
    metrics: Metrics

    @property
    def status(self) -> str:
        return self.state["status"]

    @property
    def has_finished(self) -> bool:
        return self.status == "finished"

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def error(self) -> str:
        """First line of the reason for which it has failed; empty without one."""
        return str(self.state.get("error", "")).partition("\n")[0]

    @property
    def status_text(self) -> str:
        """Status, such as `finished`, or `crashed 3/20` after 3 of 20 rounds."""
        done = int(self.metrics.get("round", 0))
        return self.status if self.has_finished else f"{self.status} {done}/{self.settings['rounds']}"


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the runs in these folders, at any depth, each once.

    Raises:
        ValueError: a folder has no runs, or a run is damaged.
    """
    errors: list[str] = []
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = list(_run_folders(folder))
        found |= {run.resolve(): run for run in reversed(runs)}
        if not folder.is_dir():
            errors.append(f"{folder} is not a folder.\n  name run folders, or folders that hold some, such as outputs")
        elif not runs:
            remedy = "name a folder with config.yaml and state.json, or one that holds some"
            errors.append(f"{folder} holds no runs.\n  {remedy}")
    if errors:
        raise ValueError("\n".join(errors))
    return [_read(run) for run in sorted(found.values())]


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, inner, files in os.walk(folder):
        if {"config.yaml", "state.json"} <= set(files):
            inner.clear()
            yield Path(path)


def _read(path: Path) -> RunRecord:
    folder = RunDir(path)
    try:
        settings = flatten(folder.settings())
        state = folder.state()
        result = folder.result() if state["status"] == "finished" else {}
        rounds: list[Metrics] = []
        steps: list[Metrics] = []
        clients = client_metrics(_read_rounds(folder.metrics, rounds, steps))
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged: {error}\n  restore it from a copy, or do not include it") from error
    metrics = {name: value for name, value in result.items() if isinstance(value, int | float)}
    return RunRecord(path, settings, state, rounds, steps, clients, metrics or _latest_metrics(rounds))


def _read_rounds(path: Path, rounds: list[Metrics], steps: list[Metrics]) -> Iterator[Metrics]:
    """Yield the metrics of each round in a file; append those that are not of single clients to `rounds`.

    Those of single steps are appended to `steps`.
    """
    for metrics in iter_jsonl(path) if path.exists() else ():
        metrics = {key: math.nan if value is None else value for key, value in metrics.items()}
        if "step" in metrics:
            steps.append(metrics)
            continue
        rounds.append({key: value for key, value in metrics.items() if not key.startswith("client/")})
        yield metrics


def _latest_metrics(rounds: Sequence[Metrics]) -> Metrics:
    """Return the content of result.json if the run had ended with these rounds."""
    last = {name: value for metrics in rounds for name, value in metrics.items() if not name.startswith(ROUND_METRICS)}
    if rounds:
        seconds = sum(metrics["seconds/round"] for metrics in rounds)
        last["examples_per_second"] = last["examples"] / max(seconds, 1e-9)
    return last


def client_metrics(history: Iterable[Mapping[str, Any]]) -> list[ClientMetric]:
    """Collect the evaluation metrics of clients from the metrics of a run's rounds.

    Args:
        history: the metrics of each round, in order; a value may be None. Only one round is in memory at a time: with
            thousands of clients a run has gigabytes of them.

    Returns:
        The metrics that have at least one finite value, sorted by name. Each has a row for every client that occurs in
        the history, including clients without test examples.
    """
    seen: set[int] = set()
    columns: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}  # of each metric: round, clients, values
    for metrics in history:
        measured: dict[str, dict[int, float]] = {}
        for key in filter(lambda key: key.startswith("client/"), metrics):
            _, client, name = key.split("/")
            seen.add(int(client))
            if name.startswith(EVALUATIONS):
                measured.setdefault(name, {})[int(client)] = metrics[key]
        for name, values in measured.items():
            column = np.array(list(values), np.int32), np.array(list(values.values()), np.float64)  # None becomes NaN
            columns.setdefault(name, []).append((metrics["round"], *column))
    clients, collected = sorted(seen), []
    for name in sorted(columns):
        values = np.full((len(clients), len(columns[name])), np.nan)
        for index, (_, of_clients, column) in enumerate(columns[name]):
            values[np.searchsorted(clients, of_clients), index] = column
        values[~np.isfinite(values)] = np.nan
        if not np.isnan(values).all():
            collected.append(ClientMetric(name, clients, [round for round, _, _ in columns[name]], values))
    return collected
