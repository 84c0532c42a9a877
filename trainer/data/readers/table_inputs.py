"""Inputs made of columns of several kinds: numbers and categories as one matrix, images by their paths, or texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unicodedata import normalize
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from trainer.data.readers.cache import cached_array
from trainer.data.readers.image_decoding import Channels, Size, decode, shape_of
from trainer.data.readers.image_folder import cache_name
from trainer.data.readers.text_inputs import TextInputs
from trainer.data.sources.agreement import Alone
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.column import NamedColumn
from trainer.data.sources.pixels import ImageSource
from trainer.data.sources.table import MISSING, TableRows, TableSource, TableStatistics, table_rows
from trainer.utils.errors import raise_errors
from trainer.utils.text import format_value, suggest

KINDS = {"number": list, "category": list, "image": str, "text": str}  # and what names their columns
ALONE = ("image", "text")  # kinds of which a column is the only input
MAX_CATEGORIES = 10_000  # of a column: more are names of rows, and silos send each other the categories
WHOLE_NUMBER = re.compile(r"([-+]?\d+)\.0*")  # as pandas writes integers of a column with gaps
DECODING_THREADS = 4


class Inputs(Protocol):
    """The inputs of all rows of the tables of a data set."""

    def source(self, rows: np.ndarray, targets: Tensor, client_ids: np.ndarray | None) -> Source:
        """Return the source of these rows."""
        ...

    def finish(self, splits: DataSplits) -> DataSplits:
        """Return the data set of such sources, ready for use."""
        ...


@dataclass(frozen=True)
class ColumnKinds:
    """The columns of inputs by kind, and how they are encoded.

    Attributes:
        image: name of a column of paths of images, which are the only inputs then.
        text: name of a column of texts, which are the only inputs then.
        statistics: the columns of numbers and categories, and how they are encoded.
        size: of images, as in `image_folder`.
        channels: of images.
        tokenizer: of texts.
        text_length: most tokens of a text.
    """

    image: str | None
    text: str | None
    statistics: TableStatistics
    size: Size = None
    channels: Channels = 3
    tokenizer: str | None = None
    text_length: int = 512

    @staticmethod
    def of(
        columns: Mapping[str, Any] | None,
        impute: Mapping[str, Any] | None,
        standardise: bool,
        size: Size,
        channels: Channels,
        tokenizer: str | None,
        text_length: int,
    ) -> ColumnKinds | None:
        """Return the kinds of these arguments of a reader; None if they name no column.

        Raises:
            ValueError: lists all that is wrong with them.
        """
        columns = dict(columns or {})
        imputes: dict[str, Any] = {"number": "mean", "category": "most_frequent", **(impute or {})}
        errors = [f"data.columns.{kind}: no kind of column{suggest(kind, [*KINDS])}" for kind in columns.keys() - KINDS]
        errors += [f"data.impute.{kind}\n  valid: number, category" for kind in imputes.keys() - {"number", "category"}]
        for kind, wanted in KINDS.items():
            value = columns.setdefault(kind, wanted() or None)
            if value and not (isinstance(value, wanted) and all(isinstance(name, str) for name in value)):
                valid = "a list of names, such as [age,city]" if wanted is list else "a name"
                errors.append(f"data.columns.{kind}={format_value(value)}\n  valid: {valid}")
        number, category = imputes["number"], imputes["category"]
        if number not in ("mean", None) and (isinstance(number, bool | str) or not math.isfinite(number)):
            errors.append(f"data.impute.number={format_value(number)}\n  valid: mean, a number, or null")
        if not isinstance(category, str | None):
            errors.append(f"data.impute.category={format_value(category)}\n  valid: most_frequent, a category, or null")
        raise_errors(errors)
        names = [normalize("NFC", name) for kind in ("number", "category") for name in columns[kind] or []]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.columns: {', '.join(repeated)} is named twice")
        alone = [f"data.columns.{kind}={columns[kind]}" for kind in ALONE if columns[kind]]
        if alone and len(alone) + len(names) > 1:
            raise ValueError(
                f"{' with '.join([*alone, *names])}: an image, or a text, is an input by itself.\n"
                "  leave the other columns of data.columns out"
            )
        if not names and not alone:
            return None
        cut, image, text = len(columns["number"] or []), columns["image"], columns["text"]
        return ColumnKinds(
            image and normalize("NFC", image),
            text and normalize("NFC", text),
            TableStatistics(
                names[:cut], names[cut:], imputes["number"], category and normalize("NFC", category), standardise
            ),
            size,
            channels,
            tokenizer,
            text_length,
        )

    @property
    def names(self) -> list[str]:
        """The names of all columns."""
        return [*self.statistics.numbers, *self.statistics.categories, *filter(None, (self.image, self.text))]

    def read(self, tables: Sequence[Any], arrow: Any, errors: list[str]) -> Inputs | None:
        """Return the inputs of all rows of Arrow tables, one table after the other; None if that appended errors."""
        before, valid = len(errors), ", ".join(tables[0].column_names)
        missing = dict.fromkeys(name for name in self.names for table in tables if name not in table.column_names)
        errors += [f"{name}: there is no such column; valid: {valid}" for name in missing]
        if missing:
            return None
        read = self._read_images if self.image else self._read_texts if self.text else self._read_rows
        inputs = read(tables, arrow, errors)
        return inputs if len(errors) == before else None

    def _read_rows(self, tables: Sequence[Any], arrow: Any, errors: list[str]) -> Inputs:
        size = sum(map(len, tables))
        ends = np.cumsum([len(table) for table in tables])[:-1]
        numbers, categories = {}, {}
        for name in self.statistics.numbers:
            values = numbers[name] = _numbers(name, [table.column(name) for table in tables], arrow, errors)
            if self.statistics.impute_number is None:
                errors += _missing_errors(name, np.split(np.isnan(values), ends), "data.impute.number=mean")
        codes = np.empty((size, len(self.statistics.categories)), np.int32)
        for column, name in enumerate(self.statistics.categories):
            found = _categories(name, [table.column(name) for table in tables], arrow, errors)
            codes[:, column], categories[name] = found
            if self.statistics.impute_category is None:
                is_missing = np.split(codes[:, column] == MISSING, ends)
                errors += _missing_errors(name, is_missing, "data.impute.category=most_frequent")
        return RowInputs(numbers, codes, categories, self.statistics)

    def _read_images(self, tables: Sequence[Any], arrow: Any, errors: list[str]) -> Inputs:
        assert self.image
        paths = [path for table in tables for path in table.column(self.image).to_pylist()]
        images = {f"{self.image} of example {row}": Path(str(path)) for row, path in enumerate(paths)}
        if absent := [f"{name}, {path}" for name, path in images.items() if not path.is_file()]:
            errors.append(f"{len(absent)} of {len(images)} images are not there, such as {absent[0]}")
            return ImageInputs(images, (self.channels, 1, 1), False)
        try:
            shape = shape_of(images, self.size, self.channels)
        except ValueError as error:
            errors.append(str(error))
            shape = (self.channels, 1, 1)
        return ImageInputs(images, shape, self.size is not None)

    def _read_texts(self, tables: Sequence[Any], arrow: Any, errors: list[str]) -> Inputs | None:
        assert self.text
        columns = [table.column(self.text).to_pylist() for table in tables]
        is_missing = [np.array([text is None for text in column]) for column in columns]
        errors += _missing_errors(self.text, is_missing, "data.path= to a file without gaps")
        texts = [text for column in columns for text in column if text is not None]
        if not all(isinstance(text, str) for text in texts):
            errors.append(f"{self.text}: {tables[0].column(self.text).type}; a column of texts needs texts")
        if errors:
            return None
        try:
            return TextInputs.of(texts, self.tokenizer, self.text_length)
        except ValueError as error:
            errors.append(str(error))
            return None


@dataclass(frozen=True)
class RowInputs:
    """Rows of numbers and categories, as `TableRows.of` takes them."""

    numbers: Mapping[str, np.ndarray]
    codes: np.ndarray
    categories: Mapping[str, tuple[str, ...]]
    statistics: TableStatistics

    def source(self, rows: np.ndarray, targets: Tensor, client_ids: np.ndarray | None) -> Source:
        numbers = {name: values[rows] for name, values in self.numbers.items()}
        made = TableRows.of(numbers, self.codes[rows], self.categories)
        return TableSource(made, self.statistics, targets, client_ids)

    def finish(self, splits: DataSplits) -> DataSplits:
        return splits.encoded_by(self.statistics.fit(table_rows([splits.train]), Alone()))


@dataclass(frozen=True)
class ImageInputs:
    """Images by name, decoded to a shape [C, H, W]."""

    images: Mapping[str, Path]
    shape: tuple[int, int, int]
    is_resized: bool

    def source(self, rows: np.ndarray, targets: Tensor, client_ids: np.ndarray | None) -> Source:
        names = list(self.images)
        images = {names[row]: self.images[names[row]] for row in rows.tolist()}
        fill = partial(decode, images, is_resized=self.is_resized, threads=DECODING_THREADS)
        shape = (len(images), *self.shape)
        pixels = cached_array(cache_name(images, shape), shape, fill)
        checksum = crc32("\n".join(f"{name} {file.stat().st_size}" for name, file in images.items()).encode())
        return ImageSource(torch.from_numpy(pixels), targets, client_ids, checksum)

    def finish(self, splits: DataSplits) -> DataSplits:
        return splits


def _numbers(name: str, columns: Sequence[Any], arrow: Any, errors: list[str]) -> np.ndarray:
    """Return float64 [N], NaN where missing; append an error for texts and for infinity."""
    parts, types = [], arrow.types
    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal, types.is_null)
    for column in columns:
        if not any(is_kind(column.type) for is_kind in kinds):
            errors.append(f"{name}: {column.type}; a column of numbers needs numbers. Name it in data.columns.category")
            return np.zeros(sum(map(len, columns)))
        column = column.cast(arrow.uint8()) if types.is_boolean(column.type) else column
        parts.append(arrow.compute.cast(column, arrow.float64(), safe=False).to_numpy())
    values = np.concatenate(parts)
    if (bad := np.isinf(values)).any():
        errors.append(NamedColumn(name, values).error(bad, "not finite"))
    return values


def _categories(name: str, columns: Sequence[Any], arrow: Any, errors: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return int32 [N], indices into the sorted categories, which are texts; -1 where missing."""
    encoded = [_dictionary(column, arrow) for column in columns]
    found = tuple(sorted({_category_name(value) for _, values in encoded for value in values if value is not None}))
    if len(found) > MAX_CATEGORIES:
        errors.append(
            f"{name}: {len(found)} categories, and {MAX_CATEGORIES} are allowed. Leave it out, or name it in "
            "data.columns.number"
        )
    index_of = {category: index for index, category in enumerate(found)}
    parts = []
    for codes, values in encoded:
        indices = [MISSING if value is None else index_of[_category_name(value)] for value in values]
        lookup = np.array([*indices, MISSING], np.int32)  # the last one is that of code -1
        parts.append(lookup[codes])
    return np.concatenate(parts), found


def _dictionary(column: Any, arrow: Any) -> tuple[np.ndarray, list[Any]]:
    """Return the distinct values of a column, and the index of each row's, -1 for null."""
    if arrow.types.is_null(column.type):
        return np.full(len(column), -1), []
    combined = column.combine_chunks()
    encoded = combined if arrow.types.is_dictionary(combined.type) else combined.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, encoded.dictionary.to_pylist()


def _category_name(value: object) -> str:
    """Return the name of a category, the same however it was written: 1 and 1.0, composed and decomposed letters."""
    text = normalize("NFC", str(value))
    whole = WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def _missing_errors(name: str, is_missing: Sequence[np.ndarray], way_out: str) -> list[str]:
    """Return an error for the first table with missing values."""
    bad = next((part for part in is_missing if part.any()), None)
    return [] if bad is None else [f"{NamedColumn(name, bad).error(bad, 'missing')}. Set {way_out}"]
