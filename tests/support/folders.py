"""Run folders with given metrics, as a run would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree
from trainer.loggers import JsonLinesLogger, Metrics

EXAMPLES = 1000  # of a round
TOTALS = ("seconds", "bytes_between_silos")
SECONDS = 2.0  # of a round and its evaluation, half of them training


@cache
def composed_tree(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the resolved configuration, which is cached: do not write to it."""
    return compose_tree(list(overrides))


def rounds_of(series: Mapping[str, Sequence[float]]) -> list[Metrics]:
    """Return rounds 1, 2, ... with the given values of metrics; examples, seconds and bytes grow."""
    count = len(next(iter(series.values())))
    return [
        {
            "round": index,
            "examples": EXAMPLES * index,
            "seconds": SECONDS * index,
            "bytes_between_silos": 400 * index,
            "seconds/round": SECONDS / 2,
            **{name: values[index - 1] for name, values in series.items()},
        }
        for index in range(1, count + 1)
    ]


def write_run(
    folder: Path,
    *overrides: str,
    status: str = "finished",
    seed: int = 0,
    error: str = "",
    **series: Sequence[float],
) -> Path:
    """Write a run folder; `test_accuracy=[0.5, 0.6]` are the values of test/accuracy in rounds 1 and 2."""
    named = {name if name in TOTALS else name.replace("_", "/", 1): values for name, values in series.items()}
    write_rounds(folder, overrides, seed, rounds_of(named) if named else [], status, error)
    return folder


def write_rounds(
    folder: Path, overrides: tuple[str, ...], seed: int, rounds: Sequence[Metrics], status: str, error: str = ""
) -> None:
    """Write a run folder with these rounds."""
    tree = deepcopy(composed_tree(overrides)) | {"seed": seed, "run_dir": str(folder)}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (folder / "state.json").write_text(json.dumps({"status": status} | ({"error": error} if error else {})))
    if rounds:
        sink = JsonLinesLogger(folder / "metrics.jsonl")
        for metrics in rounds:
            sink.log_round(metrics)
        sink.close()
    if status == "finished":
        hidden = ("client/", "slowest/", "seconds/", "delta/", "round/")
        result = {name: value for name, value in rounds[-1].items() if not name.startswith(hidden)}
        seconds = sum(metrics["seconds/round"] for metrics in rounds)
        RunDir(folder).write_result(result | {"examples_per_second": rounds[-1]["examples"] / seconds})
