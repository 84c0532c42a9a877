"""Runs grouped by configuration: mean and deviation over seeds, the best first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from trainer.commands.report.run_records import RunRecord
from trainer.commands.report.settings import Settings, configuration_of, differing, setting_text, short_titles
from trainer.loggers import HEADLINES, higher_is_better
from trainer.utils.text import suggest

SCORES = tuple(f"test/{name}" for name in HEADLINES)  # the table is ordered by the first of these that was measured


class Spread(NamedTuple):
    """Mean and sample standard deviation over runs; the latter is NaN below two."""

    mean: float
    deviation: float
    runs: int


def spread_of(values: Sequence[float]) -> Spread:
    """Return the spread of values; NaN if any of them is not finite."""
    if not all(map(math.isfinite, values)) or not values:
        return Spread(math.nan, math.nan, len(values))
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


@dataclass(frozen=True)
class Configuration:
    """Runs that differ only in their seeds.

    Attributes:
        label: names and values of the settings in which it differs from other configurations.
        cells: values of these settings.
        records: its runs.
    """

    label: str
    cells: tuple[str, ...]
    records: tuple[RunRecord, ...]

    @property
    def settings(self) -> Settings:
        return self.records[0].settings

    @property
    def has_finished(self) -> bool:
        return any(record.has_finished for record in self.records)

    @property
    def counted(self) -> list[RunRecord]:
        """Runs that its metrics are computed from: the finished ones, or all for none."""
        return [record for record in self.records if record.has_finished or not self.has_finished]

    def spread(self, name: str) -> Spread:
        """Return the spread of a metric over the counted runs that have it."""
        return spread_of([record.metrics[name] for record in self.counted if name in record.metrics])

    @property
    def seeds(self) -> str:
        """Number of seeds of the counted runs, and of the runs if there are more."""
        runs, seeds = len(self.counted), len({record.seed for record in self.counted})
        return str(seeds) if runs == seeds else f"{seeds} ({runs} runs)"

    @property
    def status_text(self) -> str:
        """Status of the unfinished runs; empty if there are none."""
        found = Counter(record.status_text for record in self.records if not record.has_finished)
        return ", ".join(f"{count} x {text}" if count > 1 else text for text, count in found.items())


@dataclass(frozen=True)
class Report:
    """Runs to report.

    Attributes:
        records: all runs.
        columns: names of the settings that differ, and `headings` their short names.
        configurations: the best first.
        score: metric by which they are ordered.
    """

    records: tuple[RunRecord, ...]
    columns: tuple[str, ...]
    headings: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    score: str


def summarize(records: Sequence[RunRecord], by: str | None = None) -> Report:
    """Group runs by configuration and order them.

    Args:
        records: at least one run.
        by: metric that orders them; None for that of the task.

    Raises:
        ValueError: no run has this metric.
    """
    assert records
    score = _score(records, by)
    groups: dict[object, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(configuration_of(record.settings), []).append(record)
    first = [group[0].settings for group in groups.values()]
    columns = differing(first)
    cells = list(zip(*(setting_text(name, first) for name in columns), strict=True)) or [()] * len(first)
    titles = short_titles(columns)
    configurations = [
        Configuration(_label(titles, values, group[0]), values, tuple(group))
        for values, group in zip(cells, groups.values(), strict=True)
    ]
    configurations.sort(key=lambda configuration: _sort_key(configuration, score))
    return Report(tuple(records), tuple(columns), tuple(titles), tuple(configurations), score)


def _label(titles: Sequence[str], cells: Sequence[str], record: RunRecord) -> str:
    settings = [f"{name}={value}" for name, value in zip(titles, cells, strict=True) if value != "–"]
    return ", ".join(settings) or record.settings.get("name") or record.folder.name


def _score(records: Sequence[RunRecord], by: str | None) -> str:
    known = list(dict.fromkeys(name for record in records for name in record.metrics))
    if by is None:
        return next((name for name in SCORES if name in known), SCORES[0])
    if by not in known:
        raise ValueError(f"--by {by}: no run has this metric{suggest(by, known)}")
    return by


def _sort_key(configuration: Configuration, score: str) -> tuple[bool, bool, float]:
    """Sort the best first, unfinished ones last, and without a score last of each."""
    mean = configuration.spread(score).mean
    return not configuration.has_finished, math.isnan(mean), -mean if higher_is_better(score) else mean
