"""Runs put together by configuration: mean and spread over seeds, the best first."""

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

SCORES = tuple(f"test/{name}" for name in HEADLINES)  # the first that there is orders the table


class Spread(NamedTuple):
    """Mean and sample standard deviation of one figure over so many runs; the deviation is NaN for fewer than two."""

    mean: float
    deviation: float
    runs: int


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of these values; one that is not finite makes mean and deviation so."""
    if not all(map(math.isfinite, values)) or not values:
        return Spread(math.nan, math.nan, len(values))
    return Spread(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seeds alone. cells: the values of the settings that differ. label: all of them."""

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
        """The runs that its figures are of: the finished ones, or if there are none, all."""
        return [record for record in self.records if record.has_finished or not self.has_finished]

    def spread(self, name: str) -> Spread:
        """The spread of this figure over the runs that have it."""
        return spread_of([record.metrics[name] for record in self.counted if name in record.metrics])

    @property
    def seeds(self) -> str:
        """The number of seeds that count, and of runs if there are more."""
        runs, seeds = len(self.counted), len({record.seed for record in self.counted})
        return str(seeds) if runs == seeds else f"{seeds} ({runs} runs)"

    @property
    def status_text(self) -> str:
        """How the unfinished runs stand; empty if there are none."""
        found = Counter(record.status_text for record in self.records if not record.has_finished)
        return ", ".join(f"{count} x {text}" if count > 1 else text for text, count in found.items())


@dataclass(frozen=True)
class Report:
    """What is reported. columns: the settings that differ. headings: their short names. score: what orders it."""

    records: tuple[RunRecord, ...]
    columns: tuple[str, ...]
    headings: tuple[str, ...]
    configurations: tuple[Configuration, ...]
    score: str

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.score)

    def has(self, name: str) -> bool:
        """Whether any run has this figure."""
        return any(name in record.metrics for record in self.records)


def summarize(records: Sequence[RunRecord], by: str | None = None) -> Report:
    """The report of these runs, best first `by` a figure; ValueError when no run has it."""
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
    configurations.sort(key=lambda configuration: _place(configuration, score))
    return Report(tuple(records), tuple(columns), tuple(titles), tuple(configurations), score)


def _label(titles: Sequence[str], cells: Sequence[str], record: RunRecord) -> str:
    settings = [f"{name}={value}" for name, value in zip(titles, cells, strict=True) if value != "–"]
    return ", ".join(settings) or record.settings.get("name") or record.folder.name


def _score(records: Sequence[RunRecord], by: str | None) -> str:
    known = list(dict.fromkeys(name for record in records for name in record.metrics))
    if by is None:
        return next((name for name in SCORES if name in known), SCORES[0])
    if by not in known:
        raise ValueError(f"--by {by}: no run has this figure{suggest(by, known)}")
    return by


def _place(configuration: Configuration, score: str) -> tuple[bool, bool, float]:
    """What sorts the best first: finished ones before others, and those without a score last among theirs."""
    mean = configuration.spread(score).mean
    has_none = math.isnan(mean)
    return (not configuration.has_finished, has_none, 0.0 if has_none else -mean if higher_is_better(score) else mean)
