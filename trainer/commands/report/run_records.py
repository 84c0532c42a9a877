"""The runs that a report is about, read from their folders as far as they came."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.loggers import Metrics, read_jsonl
from trainer.loggers.client_history import ClientMetric, client_metrics
from trainer.utils.trees import flatten

OF_A_ROUND = ("client/", "slowest/", "seconds/", "delta/", "round/")  # what result.json does not hold either


@dataclass(frozen=True)
class RunRecord:
    """What a run left.

    settings: the resolved configuration by dotted names. rounds: the metrics of each, without single clients, NaN for
    null. figures: those of result.json, or of an unfinished run the last that it measured.
    """

    folder: Path
    settings: dict[str, Any]
    state: dict[str, Any]
    rounds: list[Metrics]
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
    def status_text(self) -> str:
        """How the run stands, such as `finished` or `crashed 3/20`: after 3 of 20 rounds."""
        done = int(self.metrics.get("round", 0))
        return self.status if self.has_finished else f"{self.status} {done}/{self.settings['rounds']}"


def read_records(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders, at any depth, each once; ValueError when a folder has none or a run is damaged."""
    errors: list[str] = []
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = list(_run_folders(folder))
        found |= {run.resolve(): run for run in reversed(runs)}
        if not folder.is_dir():
            errors.append(f"{folder} is no folder.\n  name run folders, or folders that hold some, such as outputs")
        elif not runs:
            errors.append(f"{folder} holds no run: a run's folder has config.yaml and state.json.")
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
        settings = flatten(yaml.safe_load((path / "config.yaml").read_text()))
        state = folder.state()
        figures = _numeric_results(folder.result()) if state["status"] == "finished" else None
        history = read_jsonl(folder.metrics) if folder.metrics.exists() else []
    except (ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged: {error}\n  restore it from a copy, or leave it out") from error
    rounds = [_without_clients(metrics) for metrics in history]
    return RunRecord(path, settings, state, rounds, client_metrics(history), figures or _last_figures(rounds))


def _numeric_results(result: dict[str, Any]) -> Metrics:
    return {name: value for name, value in result.items() if isinstance(value, int | float)}


def _without_clients(metrics: dict[str, Any]) -> Metrics:
    return {
        name: math.nan if value is None else value for name, value in metrics.items() if not name.startswith("client/")
    }


def _last_figures(rounds: Sequence[Metrics]) -> Metrics:
    """What result.json would say if the run had ended with these rounds."""
    last = {name: value for metrics in rounds for name, value in metrics.items() if not name.startswith(OF_A_ROUND)}
    if rounds:
        seconds = sum(metrics["seconds/round"] for metrics in rounds)
        last["examples_per_second"] = last["examples"] / max(seconds, 1e-9)
    return last
