"""numpy's .npz files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.lib.npyio import NpzFile

from trainer.data.readers.cache import naming_file_in_errors
from trainer.data.readers.columns import ExampleColumns, make_splits
from trainer.data.readers.labels import Classes
from trainer.data.sources.base import DataSplits
from trainer.data.sources.column import NamedColumn

PATTERNS = ("{0}_{1}", "{1}_{0}")  # x_train, train_x


def npz(
    path: str | Path,
    inputs: str = "x",
    targets: str = "y",
    owners: str | None = None,
    weights: str | None = None,
    classes: Classes = None,
    test: float = 0.1,
) -> DataSplits:
    """The arrays of a .npz file, as numpy.savez writes it, called `inputs`, `targets`, perhaps `owners` and `weights`.

    Where there are `x_train` and `x_test`, or `train_x` and `test_x`, these are the training and the test set; else the
    fraction `test` of the examples is the test set, drawn. What the arrays may hold is said at `make_splits`. Raises one
    ValueError with all that is wrong with the file; nothing in it is unpickled.
    """
    path = Path(path).expanduser()
    with naming_file_in_errors(path), _opened(path) as file:
        wanted = {"inputs": inputs, "targets": targets, "owners": owners}
        pattern = next((pattern for pattern in PATTERNS if pattern.format(inputs, "train") in file.files), "{}")
        train = _columns(file, wanted | {"weights": weights}, pattern, "train")
        known = _columns(file, wanted, pattern, "test") if pattern != "{}" else test
        return make_splits(train, known, classes)


@contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    try:
        with path.open("rb") as content:
            if not is_zipfile(content):
                raise ValueError(
                    "no .npz file, or cut short. Fetch it again, or write it with numpy.savez(path, x=..., y=...)"
                )
            with np.load(content, allow_pickle=False) as file:
                yield file
    except OSError as error:
        raise ValueError(f"{path.absolute()} cannot be read: {error.strerror or error}") from error


def _columns(file: NpzFile, wanted: dict[str, str | None], pattern: str, part: str) -> ExampleColumns:
    """A part's arrays, by what they are for. ValueError says all that is missing or damaged."""
    errors, columns = [], {}
    for role, name in wanted.items():
        if not name:
            continue
        name = pattern.format(name, part)
        try:
            columns[role] = NamedColumn(name, np.atleast_1d(file[name]))
        except KeyError:
            errors.append(f"{name}: there is no such array")
        except (BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            errors.append(f"{name}: {error}")
    if errors:
        there = f"there are: {', '.join(file.files)}\nset data.inputs= data.targets= to the names of yours"
        raise ValueError("\n".join([*errors, there]))
    return ExampleColumns(**columns)
