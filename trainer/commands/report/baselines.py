"""Compare results with two baselines: every client alone, and all data pooled."""

from __future__ import annotations

import math
from collections.abc import Hashable

from trainer.commands.report.settings import Settings, configuration_of
from trainer.commands.report.summary import Configuration, Report
from trainer.loggers import higher_is_better
from trainer.loggers.messages import number

# Classes are compared by name: what a file of a run folder names is not imported.
POOLED = "trainer.algorithms.Sync"
NATURAL = "trainer.data.Natural"
SHARES_NOTHING = "$^"  # algorithm.shared_params in conf/algorithm/local.yaml


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
    """Return which baseline this is: algorithm=local, algorithm=sync, or none."""
    if settings.get("algorithm.shared_params") == SHARES_NOTHING:
        return "alone: the lower baseline"
    return "pooled: the upper baseline" if settings["algorithm._target_"] == POOLED else ""


def _verdict(configuration: Configuration, report: Report) -> str:
    score = configuration.spread(report.score).mean
    if math.isnan(score):
        return ""
    found: dict[str, list[float]] = {"alone": [], "pooled": []}
    for other in report.configurations:
        kind, result = _baseline(other.settings).partition(":")[0], other.spread(report.score).mean
        comparable = kind and _problem(other.settings, kind) == _problem(configuration.settings, kind)
        if comparable and other.has_finished and not math.isnan(result):
            found[kind].append(result)
    is_higher_better = higher_is_better(report.score)
    best = max if is_higher_better else min
    alone, pooled = (best(found[kind], default=None) for kind in ("alone", "pooled"))
    return compare_to_baselines(alone, score, pooled, is_higher_better)


def compare_to_baselines(lower: float | None, score: float, upper: float | None, higher_is_better: bool) -> str:
    """Tell whether a score lies between the baselines.

    Args:
        lower: score of the lower baseline; None if there is none.
        score: to compare.
        upper: score of the upper baseline; None if there is none.
        higher_is_better: whether lower <= score <= upper is expected, or the reverse.
    """
    sign = 1 if higher_is_better else -1
    if lower is not None and sign * score < sign * lower:
        return f"worse than alone, {number(lower)}"
    if upper is not None and sign * upper < sign * score:
        return f"better than pooled, {number(upper)}"
    if lower is not None and upper is not None:
        return f"between: alone {number(lower)}, pooled {number(upper)}"
    if lower is not None:
        return f"not worse than alone, {number(lower)}"
    return "" if upper is None else f"not better than pooled, {number(upper)}"


def _problem(settings: Settings, baseline: str) -> Hashable:
    """Return the settings that a configuration must share with a baseline to be compared with it."""
    groups = ("data.", "model.", "task.") + (("partition.",) if baseline == "alone" else ())
    same = configuration_of({name: value for name, value in settings.items() if name.startswith(groups)})
    return same, _clients(settings) if baseline == "alone" else None


def _clients(settings: Settings) -> object:
    """Return the number of clients. `auto` is that of the silos, unless the data determine it."""
    silos = settings["silos"]
    natural = settings["partition._target_"] == NATURAL
    if settings["clients"] != "auto" or natural:
        return settings["clients"]
    return len(silos) if isinstance(silos, list) else silos
