"""Rows of numbers and categories as one matrix: missing values imputed, numbers standardized, categories one-hot.

The statistics are sums, so that silos agree on them without showing each other an example.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.data.sources.agreement import Agreement
from trainer.data.sources.base import Source
from trainer.data.sources.column import as_targets, check_not_empty, integer_column, label_column
from trainer.utils.hardware import to_device
from trainer.utils.text import format_value

ROUNDING_UNITS = 8  # of float64, relative to the mean: a column of a smaller deviation is constant
MISSING = -1  # code of a missing category

ImputeNumber = Literal["mean"] | float | None
ImputeCategory = str | None  # most_frequent, or a category


@dataclass(frozen=True)
class TableRows:
    """Rows of a table as they were read, before statistics of other rows are known.

    Attributes:
        number_names: names of the columns of numbers.
        numbers: float32 [N, n], minus their mean, so that a small deviation from it stays; NaN where missing.
        moments: float64 [3, n]: the count of the numbers that are not missing, their mean, and the sum of squared
            deviations.
        category_names: names of the columns of categories.
        codes: int32 [N, k], indices into `categories`; -1 where missing.
        categories: sorted categories of each column.
    """

    number_names: tuple[str, ...]
    numbers: np.ndarray
    moments: np.ndarray
    category_names: tuple[str, ...]
    codes: np.ndarray
    categories: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(
        numbers: Mapping[str, np.ndarray], codes: np.ndarray, categories: Mapping[str, tuple[str, ...]]
    ) -> TableRows:
        """Make rows of numbers by name, float64 [N], NaN where missing; and of codes of categories by name."""
        centered, moments = np.empty((len(codes), len(numbers)), np.float32), np.zeros((3, len(numbers)))
        for column, values in enumerate(numbers.values()):
            present = values[~np.isnan(values)]
            if len(present):
                moments[:, column] = len(present), present.mean(), present.var() * len(present)
            centered[:, column] = values - moments[1, column]
        return TableRows(tuple(numbers), centered, moments, tuple(categories), codes, tuple(categories.values()))

    def select(self, ids: np.ndarray) -> TableRows:
        """Return some of the rows."""
        numbers = self.numbers[ids] + self.moments[1]  # in float64
        columns = dict(zip(self.number_names, numbers.T, strict=True))
        return TableRows.of(columns, self.codes[ids], dict(zip(self.category_names, self.categories, strict=True)))

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class NumberEncoding:
    """x -> ((x, or `fill` if it is missing) - mean) / std."""

    fill: float
    mean: float
    std: float


@dataclass(frozen=True)
class CategoryEncoding:
    """A column of zeros and ones for each of `categories`; missing values are of `fill`."""

    categories: tuple[str, ...]
    fill: str | None


@dataclass(frozen=True)
class TableEncoder:
    """How rows become a matrix [N, D]: the columns of numbers, then those of each category.

    A category that no training example has is a row of zeros in its columns.

    Attributes:
        numbers: by the name of the column.
        categories: likewise.
    """

    numbers: Mapping[str, NumberEncoding]
    categories: Mapping[str, CategoryEncoding]

    @property
    def column_names(self) -> tuple[str, ...]:
        """The column of the table that each column of the matrix was made of."""
        repeated = ([name] * len(each.categories) for name, each in self.categories.items())
        return (*self.numbers, *chain.from_iterable(repeated))

    @property
    def errors(self) -> list[str]:
        """An error for each column of which all values are missing."""
        numbers = [name for name, each in self.numbers.items() if math.isnan(each.fill)]
        categories = [name for name, each in self.categories.items() if not each.categories]
        return [f"data.columns: {name}: all values are missing.\n  leave it out" for name in (*numbers, *categories)]

    def to_json(self) -> str:
        """Return the encoder as JSON, as `columns.json` of a run folder has it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def load(path: str | Path) -> TableEncoder:
        """Read an encoder from `columns.json` of a run folder; raise ValueError if the file is damaged."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            return TableEncoder(
                {name: NumberEncoding(**each) for name, each in tree["numbers"].items()},
                {
                    name: CategoryEncoding(tuple(each["categories"]), each["fill"])
                    for name, each in tree["categories"].items()
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def __call__(self, columns: Mapping[str, Sequence[float | None] | Sequence[str | None]]) -> Tensor:
        """Encode columns by their names, float32 [N, D]; None and NaN are missing."""
        numbers = {name: np.array(columns[name], np.float64) for name in self.numbers}
        sets = [tuple(sorted({str(value) for value in columns[name] if value is not None})) for name in self.categories]
        codes = [
            [MISSING if value is None else names.index(str(value)) for value in columns[name]]
            for name, names in zip(self.categories, sets, strict=True)
        ]
        size = len(next(iter(columns.values())))
        stacked = np.array(codes, np.int32).reshape(len(codes), size).T
        rows = TableRows.of(numbers, stacked, dict(zip(self.categories, sets, strict=True)))
        statistics = TableStatistics(list(self.numbers), list(self.categories))
        source = TableSource(rows, statistics, torch.zeros(size)).encoded_by(self)
        return source.fetch(torch.arange(size))[0]


class TableSource:
    """Source of rows of a table, encoded when they are fetched: 4 bytes a number and a category, of any width.

    Batches are float32 [B, D] with targets [B, ...].

    Args:
        rows: the rows.
        statistics: how an encoder is fitted to them.
        targets: [N, ...].
        client_ids: natural client of every row, int64 [N].
    """

    def __init__(
        self, rows: TableRows, statistics: TableStatistics, targets: Tensor, client_ids: np.ndarray | None = None
    ) -> None:
        check_not_empty(len(rows))
        self.rows, self.statistics = rows, statistics
        self.targets = as_targets(targets) if targets.ndim == 1 else targets
        self.labels = label_column(targets)
        self.client_ids = integer_column("client_ids", client_ids, len(rows))
        # They put the codes of all columns into one range, in which missing is the first of its column.
        sizes = [len(names) + 1 for names in rows.categories]
        self.numbers = torch.from_numpy(rows.numbers)
        self.codes, self.offsets = torch.from_numpy(rows.codes), torch.tensor([0, *sizes]).cumsum(0)[:-1] + 1
        # Of the encoder.
        self.column_names: tuple[str, ...] = ()
        self.fill = self.shift = self.std = torch.empty(0)
        self.positions, self.width = torch.empty(0, dtype=torch.int64), 0

    def encoded_by(self, encoder: TableEncoder) -> TableSource:
        """Return the source with the encoder that its `fetch` uses.

        Raises:
            ValueError: the encoder is of other columns.
        """
        encoded, rows = copy(self), self.rows
        known, found = {*encoder.numbers, *encoder.categories}, {*rows.number_names, *rows.category_names}
        if known != found:
            raise ValueError(
                f"data.columns has {', '.join(sorted(found))}, and columns.json of the model "
                f"{', '.join(sorted(known))}\n  leave data.columns as the run has it"
            )
        numbers = [encoder.numbers[name] for name in rows.number_names]
        fill, mean, std = (np.array([getattr(each, key) for each in numbers]) for key in ("fill", "mean", "std"))
        center = rows.moments[1]
        encoded.fill, encoded.shift, encoded.std = (
            torch.from_numpy(each.astype(np.float32)) for each in (fill - center, center - mean, std)
        )
        encoded.column_names = encoder.column_names
        encoded.width = len(encoder.column_names)
        positions, start = [], len(numbers)
        for name, known in zip(rows.category_names, rows.categories, strict=True):
            encoding = encoder.categories[name]
            column_of = {category: start + index for index, category in enumerate(encoding.categories)}
            # The last column is cut off: that of categories that were not seen in training.
            missing = encoded.width if encoding.fill is None else column_of.get(encoding.fill, encoded.width)
            positions += [missing, *(column_of.get(category, encoded.width) for category in known)]
            start += len(encoding.categories)
        encoded.positions = torch.tensor(positions, dtype=torch.int64)
        return encoded

    def select(self, ids: np.ndarray) -> TableSource:
        """Return some of the rows, of which there is at least one, without an encoder."""
        client_ids = None if self.client_ids is None else self.client_ids[ids]
        return TableSource(self.rows.select(ids), self.statistics, self.targets[torch.from_numpy(ids)], client_ids)

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = to_device(ids, self.numbers.device)
        numbers = self.numbers.index_select(0, ids)
        numbers = (torch.where(numbers.isnan(), self.fill, numbers) + self.shift) / self.std
        inputs = numbers.new_zeros(len(ids), self.width + 1)
        inputs[:, : numbers.shape[1]] = numbers
        inputs.scatter_(1, self.positions[self.codes.index_select(0, ids) + self.offsets], 1.0)
        return inputs[:, :-1].contiguous(), as_targets(self.targets.index_select(0, ids))

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.codes.nbytes + self.targets.nbytes

    def to(self, device: torch.device) -> TableSource:
        moved = copy(self)
        for name in ("numbers", "codes", "offsets", "targets", "fill", "shift", "std", "positions"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def fingerprint_data(self) -> list[np.ndarray]:
        """Return the rows as they were read: the statistics follow from them."""
        names = "\0".join(chain.from_iterable(self.rows.categories)).encode()
        return [
            self.rows.numbers,
            self.rows.moments,
            self.rows.codes,
            np.frombuffer(names, np.uint8),
            self.targets.numpy(),
        ]


@dataclass(frozen=True)
class TableStatistics:
    """The columns of a table, and how an encoder is fitted to training rows.

    Attributes:
        numbers: names of the columns of numbers.
        categories: names of the columns of categories.
        impute_number: of missing numbers, the mean of the others or this number; None: there must be none.
        impute_category: of missing categories, `most_frequent` or this one; None: there must be none.
        standardise: whether numbers are divided by their standard deviation after their mean is subtracted.
    """

    numbers: list[str]
    categories: list[str]
    impute_number: ImputeNumber = "mean"
    impute_category: ImputeCategory = "most_frequent"
    standardise: bool = True

    def __str__(self) -> str:
        kinds = {"numbers": self.numbers, "categories": self.categories}
        named = [f"{kind} [{', '.join(names)}]" for kind, names in kinds.items() if names]
        imputed = f"imputed by {format_value(self.impute_number)} and {format_value(self.impute_category)}"
        return ", ".join([*named, imputed, "standardised" if self.standardise else "not standardised"])

    def fit(self, tables: Sequence[TableRows], agreement: Agreement) -> TableEncoder:
        """Return the encoder of these rows, and of those of other silos. A silo may have none."""
        numbers = self._fit_numbers(tables, agreement) if self.numbers else {}
        return TableEncoder(numbers, self._fit_categories(tables, agreement) if self.categories else {})

    def _fit_numbers(self, tables: Sequence[TableRows], agreement: Agreement) -> dict[str, NumberEncoding]:
        columns, moments = len(self.numbers), [table.moments for table in tables]
        sizes = [len(table) for table in tables]
        local = [
            np.stack((count, count * mean, size - count)) for size, (count, mean, _) in zip(sizes, moments, strict=True)
        ]
        count, sums, missing = agreement.total("columns-numbers", sum(local, np.zeros((3, columns))))
        if self.impute_number in ("mean", None):
            fill = np.where(count, sums / np.maximum(count, 1), np.nan)
        else:
            fill = np.full(columns, float(self.impute_number))
        mean = (sums + missing * fill) / (count + missing)
        deviations = [each[2] + each[0] * (each[1] - mean) ** 2 for each in moments]
        squares = agreement.total("columns-deviations", sum(deviations, np.zeros(columns)))
        std = np.sqrt((squares + missing * (fill - mean) ** 2) / (count + missing))
        std[std <= ROUNDING_UNITS * np.finfo(np.float64).eps * np.abs(mean)] = 1.0
        if not self.standardise:
            mean, std = np.zeros(columns), np.ones(columns)
        return dict(zip(self.numbers, map(NumberEncoding, fill.tolist(), mean.tolist(), std.tolist()), strict=True))

    def _fit_categories(self, tables: Sequence[TableRows], agreement: Agreement) -> dict[str, CategoryEncoding]:
        counts = [[_count(table, column) for table in tables] for column in range(len(self.categories))]
        occurring = [{category for count in each for category in count if category is not None} for each in counts]
        sets = agreement.union("columns-categories", [sorted(each) for each in occurring])
        # In one sum, for each column: how many values are missing, and how many there are of each category.
        local = [
            sum(count.get(category, 0) for count in each)
            for each, found in zip(counts, sets, strict=True)
            for category in (None, *found)
        ]
        ends = np.cumsum([len(found) + 1 for found in sets])
        parts = np.split(agreement.total("columns-frequencies", np.array(local, np.float64)), ends[:-1])
        encodings = {}
        for name, found, (missing, *frequencies) in zip(self.categories, sets, parts, strict=True):
            fill = self.impute_category
            if fill == "most_frequent":
                fill = found[int(np.argmax(frequencies))] if found else None
            found = sorted({*found, fill}) if missing and fill is not None else found
            encodings[name] = CategoryEncoding(tuple(found), fill)
        return encodings


def table_rows(sources: Iterable[Source]) -> list[TableRows]:
    """Return the rows of those sources that are of a table."""
    return [source.rows for source in sources if isinstance(source, TableSource)]


def _count(table: TableRows, column: int) -> dict[str | None, int]:
    """Return the number of rows of each category that occurs, and under None of those without one."""
    names = (None, *table.categories[column])
    counts = np.bincount(table.codes[:, column] + 1, minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}
