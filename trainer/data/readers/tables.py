"""Readers of tables with named columns: Parquet, CSV and JSON lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from trainer.data.readers.arrow_tables import Names, make_inputs_from_table, make_splits_from_tables, pyarrow
from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.columns import Classes
from trainer.data.readers.image_decoding import Channels, Size
from trainer.data.readers.limits import check_unpacked_size
from trainer.data.readers.table_files import (
    check_names,
    column_names,
    csv_line,
    encoding_error,
    find_files,
    json_line,
    open_utf8,
)
from trainer.data.readers.table_inputs import ColumnKinds
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.table import TableEncoder
from trainer.utils.errors import raise_errors

Wanted = Mapping[str, Names]  # the names of the columns of each role

VALUE_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # of Parquet's types
DICTIONARY_INDEX_BYTES = 4  # of a text
JSON_BLOCK_BYTES = 1 << 26  # a line must fit into a block of pyarrow's reader
# As pandas has them. Only numbers and categories may be missing: a label may be called NA.
MISSING_MARKS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
CSV_ERROR = re.compile(r"In CSV column #(\d+): .*invalid value '(.*)'", re.DOTALL)
JSON_ERROR = re.compile(r"Column\(/([^/]*)\) changed from ")

ARGUMENTS = """
    Args:
        path: the file; a folder of files; or a pattern such as part-*.csv.gz.
        targets: column of the targets; None if the inputs are rows of tokens.
        inputs: one column, or several columns of numbers; None for all columns with no other role.
        columns: the columns of the inputs by kind instead: lists of names under `number` and `category`, which become
            one matrix; or under `image` the name of a column of paths of images, relative to the file; or under `text`
            that of a column of texts.
        impute: of `columns`, how missing values are replaced: `number` is `mean`, a number, or None to refuse them;
            `category` is `most_frequent`, a category, or None.
        standardise: of `columns`, whether numbers become (x - mean) / std.
        size: of images, both sides or [height, width]; None if all have the same size.
        channels: of images, 3 for RGB, 1 for grey.
        tokenizer: of texts, see `load_tokenizer`.
        text_length: most tokens of a text; longer ones are cut.
        client_ids: column of the natural clients.
        weights: column of the weights of the training examples.
        classes: number or names of the classes; None for those that occur.
        test: fraction of the examples to draw as the test set.
        test_path: a file of test examples instead.
        validation_path: a file of validation examples.

    Raises:
        ValueError: lists every problem with the file; see `make_splits_from_tables`.
    """

ReadTable = Callable[[Path, Wanted, ColumnKinds | None], Any]

READERS: dict[str, ReadTable] = {}  # of tables, by the names of the functions below


def _splits_reader(read_table: ReadTable):
    """Decorate a function that reads a table to read a data set, with the arguments above."""
    READERS[read_table.__name__] = read_table

    def read_splits(
        path: str | Path,
        targets: str | None = "label",
        inputs: Names = None,
        columns: dict[str, Any] | None = None,
        impute: dict[str, Any] | None = None,
        standardise: bool = True,
        size: Size = None,
        channels: Channels = 3,
        tokenizer: str | None = None,
        text_length: int = 512,
        client_ids: str | None = None,
        weights: str | None = None,
        classes: Classes = None,
        test: float = 0.1,
        test_path: str | Path | None = None,
        validation_path: str | Path | None = None,
    ) -> DataSplits:
        kinds = ColumnKinds.of(columns, impute, standardise, size, channels, tokenizer, text_length)
        if kinds and (inputs is not None or targets is None):
            other = "data.targets=null" if inputs is None else f"data.inputs={inputs}"
            raise ValueError(f"{other} with data.columns: they name the inputs by their kinds\n  leave one of them out")
        wanted = _wanted(inputs, targets, client_ids, weights)
        path = Path(path).expanduser()
        with name_file_in_errors(path):
            tables = {
                part: _read(read_table, Path(file).expanduser(), wanted, kinds)
                for part, file in (("train", path), ("test", test_path), ("validation", validation_path))
                if file is not None
            }
            return make_splits_from_tables(**{"test": test, **tables}, wanted=wanted, classes=classes, kinds=kinds)

    read_splits.__name__ = read_splits.__qualname__ = read_table.__name__
    read_splits.__doc__ = f"{read_table.__doc__}\n{ARGUMENTS}"
    return read_splits


def read_table_inputs(
    kind: str,
    path: Path,
    encoder: TableEncoder | None = None,
    inputs: Names = None,
    columns: dict[str, Any] | None = None,
    size: Size = None,
    channels: Channels = 3,
    tokenizer: str | None = None,
    text_length: int = 512,
    targets: str | None = "label",
    client_ids: str | None = None,
    weights: str | None = None,
) -> Source:
    """Read the inputs of a table, which need have no other columns; the targets of the source are zeros.

    Args:
        kind: `csv`, `jsonl` or `parquet`.
        path: the file; or as for these readers.
        encoder: of the training rows, for `number` and `category` of `columns`.
        inputs: as for these readers, and so are all that follow.
        columns: see there.
        size: see there.
        channels: see there.
        tokenizer: see there.
        text_length: see there.
        targets: a column that is no input.
        client_ids: likewise.
        weights: likewise.

    Raises:
        ValueError: lists every problem with the inputs.
    """
    kinds = ColumnKinds.of(columns, None, True, size, channels, tokenizer, text_length)
    wanted = _wanted(inputs, targets, client_ids, weights)
    with name_file_in_errors(path, ""):
        return make_inputs_from_table(_read(READERS[kind], path, wanted, kinds), wanted, kinds, encoder)


def _wanted(inputs: Names, targets: str | None, client_ids: str | None, weights: str | None) -> Wanted:
    roles = {"inputs": inputs, "targets": targets, "client_ids": client_ids, "weights": weights}
    return {role: _compose(names) for role, names in roles.items()}


def _compose(names: Names) -> Names:
    """Return names in the composed form of Unicode, in which those of the columns are compared."""
    return [normalize("NFC", name) for name in names] if isinstance(names, list) else names and normalize("NFC", names)


def _read(read_table: ReadTable, path: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    arrow = pyarrow()
    try:
        return read_table(path, wanted, kinds)
    except (OSError, arrow.ArrowException) as error:
        kind, reason = read_table.__name__, str(error).splitlines()[0]
        raise ValueError(f"{path.absolute()} is not a {kind} file, or damaged: {reason}") from error


@_splits_reader
def parquet(path: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    """Read columns of a Parquet file, or of all Parquet files in a folder, into memory."""
    arrow = pyarrow()
    files = path if path.is_dir() else find_files(path)
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    dataset = arrow.parquet.ParquetDataset(files)
    written, names = {normalize("NFC", name): name for name in dataset.schema.names}, _wanted_names(wanted, kinds)
    # Missing columns are reported later, with all other problems.
    names = [written[name] for name in (names or written) if name in written]
    # A few bytes may stand for any number of equal values. Texts stay in their dictionaries, where they are once.
    check_unpacked_size(path.name, sum(_unpacked_bytes(part.metadata, names) for part in dataset.fragments))
    texts = [name for name in names if arrow.types.is_string(dataset.schema.field(name).type)]
    table = arrow.parquet.read_table(files, columns=names, read_dictionary=texts)
    return _prepare(table, path if path.is_dir() else path.parent, kinds)


@_splits_reader
def csv(path: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    """Read columns of CSV files, whose first line names them, into memory."""
    return _concatenate([(file, _read_csv(file, wanted, kinds)) for file in find_files(path)], True)


@_splits_reader
def jsonl(path: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    """Read fields of JSON lines files, one object per line, into memory."""
    return _concatenate([(file, _read_jsonl(file, wanted, kinds)) for file in find_files(path)], False)


def _wanted_names(wanted: Wanted, kinds: ColumnKinds | None) -> list[str] | None:
    """Return the names of all columns that have a role; None for all of a file."""
    if wanted["inputs"] is None and kinds is None:
        return None
    roles = [name for each in wanted.values() for name in ([each] if isinstance(each, str) else each or [])]
    return list(dict.fromkeys([*(kinds.names if kinds else []), *roles]))


def _prepare(table: Any, folder: Path, kinds: ColumnKinds | None) -> Any:
    """Return a table with composed names of columns, and with whole paths of images, which are relative to a folder."""
    check_names(table.column_names)
    composed = [normalize("NFC", name) for name in table.column_names]
    table = table if composed == table.column_names else table.rename_columns(composed)
    if kinds and kinds.image in composed:
        paths = [path and str(folder / path) for path in table.column(kinds.image).to_pylist()]
        table = table.set_column(composed.index(kinds.image), kinds.image, [paths])
    return table


def _unpacked_bytes(metadata: Any, names: Sequence[str]) -> int:
    """Return the bytes in memory of these columns of a Parquet file, by the numbers of values that it claims."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    wanted = [each for each in columns if any(f"{each.path_in_schema}.".startswith(f"{name}.") for name in names)]
    return sum(each.num_values * VALUE_BYTES.get(each.physical_type, DICTIONARY_INDEX_BYTES) for each in wanted)


def _read_csv(file: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    arrow = pyarrow()
    names = column_names(file, arrow)
    composed, options = [normalize("NFC", name) for name in names], {}
    needed = _wanted_names(wanted, kinds) or composed
    if set(needed) <= set(composed):  # otherwise the error names all columns
        options["include_columns"] = [names[composed.index(name)] for name in needed]
    if kinds:
        types = dict.fromkeys(kinds.names, arrow.string()) | dict.fromkeys(kinds.statistics.numbers, arrow.float64())
        options["column_types"] = {name: types[key] for name, key in zip(names, composed, strict=True) if key in types}
        options["null_values"] = MISSING_MARKS
    try:
        with open_utf8(file, arrow) as stream:
            parse = arrow.csv.ParseOptions(newlines_in_values=kinds is not None and kinds.text is not None)
            table = arrow.csv.read_csv(stream, None, parse, arrow.csv.ConvertOptions(**options))
    except arrow.ArrowInvalid as error:
        if found := CSV_ERROR.search(str(error)):
            column, value = int(found[1]), found[2]
            raise ValueError(_no_number(composed[column], csv_line(file, arrow, column, value), value)) from error
        if "UTF8" in str(error):
            raise ValueError(encoding_error(file)) from error
        raise
    if any(arrow.types.is_binary(field.type) for field in table.schema):
        raise ValueError(encoding_error(file))
    table = _prepare(table, file.parent, kinds)
    if kinds:
        return _without_marks(table, kinds.statistics.categories, arrow)
    for name in set(_input_columns(composed, wanted)) & set(table.column_names):
        if value := _mixed_in(table.column(name), arrow):
            raise ValueError(_no_number(name, csv_line(file, arrow, composed.index(name), value), value))
    return table


def _read_jsonl(file: Path, wanted: Wanted, kinds: ColumnKinds | None) -> Any:
    arrow = pyarrow()
    try:
        with open_utf8(file, arrow) as stream:
            table = arrow.json.read_json(stream, arrow.json.ReadOptions(block_size=JSON_BLOCK_BYTES))
    except arrow.ArrowInvalid as error:
        found = JSON_ERROR.search(str(error))
        line, value = json_line(file, arrow, found[1]) if found else (0, None)
        if found and line:
            kind = "a number" if isinstance(value, int | float) else repr(value)
            raise ValueError(f"{found[1]}: line {line} has {kind}, unlike the lines before. Correct it") from error
        raise
    table = _prepare(table, file.parent, kinds)
    for name in kinds.statistics.numbers if kinds else ():
        if name in table.column_names and arrow.types.is_string(table.schema.field(name).type):
            raise ValueError(_no_number(name, *json_line(file, arrow, name, wants_number=True)))
    return table


def _no_number(name: str, line: int, value: object) -> str:
    way_out = "Correct it, or name the column in data.columns.category"
    return f"{name}: line {line} has {value!r}, which is no number. {way_out}"


def _input_columns(names: Sequence[str], wanted: Wanted) -> list[str]:
    """Return the names of the inputs, of which several must be numbers."""
    inputs = wanted["inputs"]
    others = [wanted[role] for role in ("targets", "client_ids", "weights")]
    return [inputs] if isinstance(inputs, str) else inputs or [name for name in names if name not in others]


def _mixed_in(column: Any, arrow: Any) -> str:
    """Return the first text of a column that holds numbers too; empty for a column of one kind."""
    if not arrow.types.is_string(column.type):
        return ""
    text, has_numbers = "", False
    for value in column.to_pylist():
        if value and _is_number(value):
            has_numbers = True
        elif value:
            text = text or value
        if text and has_numbers:
            return text
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _without_marks(table: Any, names: Sequence[str], arrow: Any) -> Any:
    """Return a table with null in place of the texts that mark missing values, in these columns."""
    for name in set(names) & set(table.column_names):
        column = table.column(name)
        is_missing = arrow.compute.is_in(column, value_set=arrow.array(MISSING_MARKS))
        column = arrow.compute.if_else(is_missing, arrow.scalar(None, arrow.string()), column)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _concatenate(parts: Sequence[tuple[Path, Any]], has_header: bool) -> Any:
    """Return the rows of the tables of several files; raise ValueError if their columns are not alike."""
    arrow, (first, table), tables = pyarrow(), parts[0], [table for _, table in parts]
    errors = []
    for file, other in parts[1:]:
        if has_header and set(other.column_names) != set(table.column_names):
            differing = sorted(set(other.column_names) ^ set(table.column_names))
            errors.append(f"{first.name} and {file.name} do not have the same columns: {', '.join(differing)}")
            break
    raise_errors(errors)
    try:
        return arrow.concat_tables(tables, promote_options="permissive")
    except arrow.ArrowException:
        for file, other in parts[1:]:
            for name in set(other.column_names) & set(table.column_names):
                one, two = table.schema.field(name).type, other.schema.field(name).type
                is_text = [arrow.types.is_string(kind) for kind in (one, two)]
                if is_text[0] != is_text[1]:
                    errors.append(f"{name}: {one} in {first.name}, and {two} in {file.name}")
        raise_errors(errors[:1])
        raise
