"""Reader of numpy's .npz files."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from numpy.lib.npyio import NpzFile

from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.columns import Classes, Columns, make_inputs, make_splits
from trainer.data.readers.limits import check_unpacked_size
from trainer.data.readers.test_split import HELD_OUT_NAMES, held_out_names
from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.column import NamedColumn
from trainer.utils.text import format_bytes

PATTERNS = ("{0}_{1}", "{1}_{0}")  # x_train, train_x
HEADER_READERS = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}


def npz(
    path: str | Path,
    inputs: str = "x",
    targets: str = "y",
    client_ids: str | None = None,
    weights: str | None = None,
    classes: Classes = None,
    test: float = 0.1,
) -> DataSplits:
    """Read the arrays of a .npz file, as numpy.savez writes it. Nothing is unpickled.

    If the file has `x_train` and `x_test`, or `train_x` and `test_x`, these are the training and the test set. `x_val`,
    or `x_validation`, is the validation set, or without `x_test` the test set.

    Args:
        path: the file.
        inputs: name of the array of inputs, without `train` and `test`.
        targets: name of the array of targets.
        client_ids: name of the array of natural clients.
        weights: name of the array of weights of the training examples.
        classes: number or names of the classes; None for those that occur.
        test: fraction of the examples to draw as the test set, if the file has none.

    Raises:
        ValueError: lists every problem with the file; see `make_splits`.
    """
    path = Path(path).expanduser()
    with name_file_in_errors(path), _open(path) as file:
        wanted = {"inputs": inputs, "targets": targets, "client_ids": client_ids}
        pattern = next((pattern for pattern in PATTERNS if pattern.format(inputs, "train") in file.files), "{}")
        train = _read_columns(file, wanted | {"weights": weights}, pattern, "train")
        if pattern == "{}":
            return make_splits(train, test, classes)
        found = held_out_names([part for part in HELD_OUT_NAMES if pattern.format(inputs, part) in file.files])
        tests = _read_columns(file, wanted, pattern, found[0] or "test")
        return make_splits(
            train, tests, classes, validation=_read_columns(file, wanted, pattern, found[1]) if found[1] else None
        )


def read_npz_inputs(path: Path, inputs: str = "x") -> Source:
    """Read an array of inputs of a .npz file; the targets of the source are zeros.

    Raises:
        ValueError: lists every problem with it.
    """
    with name_file_in_errors(path, ""), _open(path) as file:
        return make_inputs(_read_columns(file, {"inputs": inputs}, "{}", "")["inputs"])


@contextmanager
def _open(path: Path) -> Iterator[NpzFile]:
    try:
        with path.open("rb") as content:
            if not is_zipfile(content):
                raise ValueError(
                    "not a .npz file, or cut short. Fetch it again, or write it with numpy.savez(path, x=..., y=...)"
                )
            with np.load(content, allow_pickle=False) as file:
                yield file
    except OSError as error:
        raise ValueError(f"{path.absolute()} cannot be read: {error.strerror or error}") from error


def _read_columns(file: NpzFile, wanted: dict[str, str | None], pattern: str, part: str) -> Columns:
    """Read the arrays of a part; raise ValueError with every missing or damaged one."""
    errors, columns = [], {}
    for role, name in wanted.items():
        if not name:
            continue
        name = pattern.format(name, part)
        try:
            columns[role] = NamedColumn(name, np.atleast_1d(_read_array(file, name)))
        except KeyError:
            errors.append(f"{name}: there is no such array")
        except (BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            errors.append(f"{name}: {error}")
    if errors:
        valid = f"valid: {', '.join(file.files)}\nset data.inputs= and data.targets= to names of this file"
        raise ValueError("\n".join([*errors, valid]))
    return columns


def _read_array(file: NpzFile, name: str) -> np.ndarray:
    """Return an array, for which memory is taken by its header: one that claims more than the file has is refused."""
    if (size := _claimed_size(file, name)) is not None:
        check_unpacked_size("the array", size)
    return file[name]


def _claimed_size(file: NpzFile, name: str) -> int | None:
    """Return the bytes of the numbers of an array; None if it holds something else, which numpy refuses."""
    assert file.zip is not None  # the file is open
    if f"{name}.npy" not in file.zip.namelist():
        return None
    entry = file.zip.getinfo(f"{name}.npy")
    with file.zip.open(entry) as content:
        read_header = HEADER_READERS.get(read_magic(content))
        if read_header is None:
            return None
        shape, _, dtype = read_header(content)
    if dtype.hasobject:
        return None
    if (size := math.prod(shape) * dtype.itemsize) > entry.file_size:
        raise ValueError(f"its header claims {dtype} {list(shape)}, and it has {format_bytes(entry.file_size)}")
    return size
