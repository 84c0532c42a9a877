"""Where a federated result lies between its brackets: every client alone, and all data pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from operator import lt

from trainer.commands.report.settings import Settings, configuration_of
from trainer.commands.report.summary import Configuration, Report
from trainer.loggers.messages import number

SHARES_NOTHING = "$^"  # algorithm.shared_params of conf/algorithm/local.yaml


def is_local_only(settings: Settings) -> bool:
    """Whether every client trained alone, algorithm=local: the lower bracket."""
    return settings.get("algorithm.shared_params") == SHARES_NOTHING


def is_pooled(settings: Settings) -> bool:
    """Whether all data were trained on together, algorithm=sync: the upper bracket."""
    return settings["algorithm._target_"] == "trainer.algorithms.Sync"


def baselines(report: Report) -> list[str]:
    """What is said of each configuration: which bracket it is, or how it lies to those that there are.

    Nothing of any, where none lies to a bracket. Of several configurations that are the same bracket, on the same data
    and model, the best counts.
    """
    said = [_baseline(configuration.settings) for configuration in report.configurations]
    verdicts = [
        "" if bracket else _verdict(configuration, report)
        for bracket, configuration in zip(said, report.configurations, strict=True)
    ]
    return [bracket or ours for bracket, ours in zip(said, verdicts, strict=True)] if any(verdicts) else verdicts


def _baseline(settings: Settings) -> str:
    if is_local_only(settings):
        return "alone: the lower bracket"
    return "pooled: the upper bracket" if is_pooled(settings) else ""


def _verdict(configuration: Configuration, report: Report) -> str:
    ours = configuration.spread(report.score).mean
    if math.isnan(ours):
        return ""
    lower = _best(report, configuration, is_local_only, _ground_of_clients)
    upper = _best(report, configuration, is_pooled, _ground)
    return compare_to_baselines(lower, ours, upper, report.higher_is_better)


def compare_to_baselines(lower: float | None, ours: float, upper: float | None, higher_is_better: bool) -> str:
    """Whether lower <= ours <= upper, in words; where less is better the other way round. None: there is none."""

    def is_worse(one: float, other: float) -> bool:
        return lt(one, other) if higher_is_better else lt(other, one)

    if lower is not None and is_worse(ours, lower):
        return f"worse than alone, {number(lower)}"
    if upper is not None and is_worse(upper, ours):
        return f"better than pooled, {number(upper)}"
    if lower is not None and upper is not None:
        return f"between: alone {number(lower)}, pooled {number(upper)}"
    if lower is not None:
        return f"not worse than alone, {number(lower)}"
    return "" if upper is None else f"not better than pooled, {number(upper)}"


def _best(
    report: Report,
    ours: Configuration,
    is_bracket: Callable[[Settings], bool],
    ground: Callable[[Settings], Hashable],
) -> float | None:
    """The best score of the finished configurations that are this bracket on the same ground as ours."""
    same = [
        each.spread(report.score).mean
        for each in report.configurations
        if is_bracket(each.settings) and each.has_finished and ground(each.settings) == ground(ours.settings)
    ]
    scores = [score for score in same if not math.isnan(score)]
    return (max if report.higher_is_better else min)(scores) if scores else None


def _ground(settings: Settings) -> Hashable:
    """The data, model and task."""
    return configuration_of(_of_groups(settings, "data.", "model.", "task."))


def _ground_of_clients(settings: Settings) -> Hashable:
    """The same, and how the data are dealt to how many clients."""
    return _ground(settings), configuration_of(_of_groups(settings, "partition.")), _clients(settings)


def _of_groups(settings: Settings, *groups: str) -> Settings:
    return {name: value for name, value in settings.items() if name.startswith(groups)}


def _clients(settings: Settings) -> object:
    """The number of clients; where it is left open it hangs on the silos, or on the data themselves."""
    silos = settings["silos"]
    alone = len(silos) if isinstance(silos, list) else silos
    natural = settings["partition._target_"].endswith("Natural")
    return settings["clients"] if settings["clients"] != "auto" or natural else alone
