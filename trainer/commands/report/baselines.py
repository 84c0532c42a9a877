"""Compare results with two baselines: every client alone, and all data pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from operator import lt

from trainer.commands.report.settings import Settings, configuration_of
from trainer.commands.report.summary import Configuration, Report
from trainer.loggers.messages import number

# Classes are compared by name: what a file of a run folder names is not imported.
POOLED = "trainer.algorithms.Sync"
NATURAL = "trainer.data.Natural"
SHARES_NOTHING = "$^"  # algorithm.shared_params in conf/algorithm/local.yaml


def is_local_only(settings: Settings) -> bool:
    """Return whether every client trained alone, as with algorithm=local."""
    return settings.get("algorithm.shared_params") == SHARES_NOTHING


def is_pooled(settings: Settings) -> bool:
    """Return whether one model was trained on all data, as with algorithm=sync."""
    return settings["algorithm._target_"] == POOLED


def baselines(report: Report) -> list[str]:
    """Return how each configuration compares with the baselines, or which it is.

    All are empty where nothing can be compared. Of several configurations that are the same baseline, on the same data
    and model, the best counts.
    """
    names = [_baseline(configuration.settings) for configuration in report.configurations]
    verdicts = [
        "" if name else _verdict(configuration, report)
        for name, configuration in zip(names, report.configurations, strict=True)
    ]
    return [name or verdict for name, verdict in zip(names, verdicts, strict=True)] if any(verdicts) else verdicts


def _baseline(settings: Settings) -> str:
    if is_local_only(settings):
        return "alone: the lower baseline"
    return "pooled: the upper baseline" if is_pooled(settings) else ""


def _verdict(configuration: Configuration, report: Report) -> str:
    score = configuration.spread(report.score).mean
    if math.isnan(score):
        return ""
    lower = _best(report, configuration, is_local_only, _problem_and_clients)
    upper = _best(report, configuration, is_pooled, _problem)
    return compare_to_baselines(lower, score, upper, report.higher_is_better)


def compare_to_baselines(lower: float | None, score: float, upper: float | None, higher_is_better: bool) -> str:
    """Tell whether a score lies between the baselines.

    Args:
        lower: score of the lower baseline; None if there is none.
        score: to compare.
        upper: score of the upper baseline; None if there is none.
        higher_is_better: whether lower <= score <= upper is expected, or the reverse.
    """

    def is_worse(one: float, other: float) -> bool:
        return lt(one, other) if higher_is_better else lt(other, one)

    if lower is not None and is_worse(score, lower):
        return f"worse than alone, {number(lower)}"
    if upper is not None and is_worse(upper, score):
        return f"better than pooled, {number(upper)}"
    if lower is not None and upper is not None:
        return f"between: alone {number(lower)}, pooled {number(upper)}"
    if lower is not None:
        return f"not worse than alone, {number(lower)}"
    return "" if upper is None else f"not better than pooled, {number(upper)}"


def _best(
    report: Report,
    configuration: Configuration,
    is_baseline: Callable[[Settings], bool],
    problem: Callable[[Settings], Hashable],
) -> float | None:
    """Return the best score of the finished baselines for the same problem."""
    same = [
        other.spread(report.score).mean
        for other in report.configurations
        if is_baseline(other.settings)
        and other.has_finished
        and problem(other.settings) == problem(configuration.settings)
    ]
    scores = [score for score in same if not math.isnan(score)]
    return (max if report.higher_is_better else min)(scores) if scores else None


def _problem(settings: Settings) -> Hashable:
    """Return the data, model and task."""
    return configuration_of(_select(settings, "data.", "model.", "task."))


def _problem_and_clients(settings: Settings) -> Hashable:
    """Return the data, model and task, the partition, and the number of clients."""
    return _problem(settings), configuration_of(_select(settings, "partition.")), _clients(settings)


def _select(settings: Settings, *groups: str) -> Settings:
    return {name: value for name, value in settings.items() if name.startswith(groups)}


def _clients(settings: Settings) -> object:
    """Return the number of clients.

    `auto` is that of the silos, unless the data determine it.
    """
    silos = settings["silos"]
    num_silos = len(silos) if isinstance(silos, list) else silos
    natural = settings["partition._target_"] == NATURAL
    return settings["clients"] if settings["clients"] != "auto" or natural else num_silos
