"""Files of tokens, memory-mapped: what is not asked for is never read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.data.readers.cache import naming_file_in_errors
from trainer.data.readers.test_split import test_fraction_errors
from trainer.data.sources.base import DataSplits

# So much is looked at before training, from all over the file; every window is looked at again when it is fetched.
MAX_WINDOWS, MAX_TOKENS = 1024, 1 << 20

Dtype = Literal["uint16", "uint32"]


class TokenSource:
    """Windows of a sequence of tokens that need not fit into memory, as a Source: inputs, and targets one place later.

    `tokens` is an integer vector, usually a memory-mapped one, of numbers below `vocabulary`. Window i starts at token
    i * length; its targets reach one token further; a tail shorter than a window is dropped. Batches are int64
    [B, length]. `fetch` raises ValueError for a token outside the vocabulary.
    """

    labels: np.ndarray | None = None
    client_ids: np.ndarray | None = None

    def __init__(self, tokens: np.ndarray, length: int, vocabulary: int) -> None:
        self.windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
        self.length, self.vocabulary = length, vocabulary

    def __len__(self) -> int:
        return len(self.windows)

    def fetch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.windows[ids.numpy()].astype(np.int64)
        if rows.size and rows.max() >= self.vocabulary:
            raise ValueError(_out_of_vocabulary(rows, ids.numpy() * self.length, self.vocabulary))
        batch = torch.from_numpy(rows)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def fingerprint_data(self) -> list[np.ndarray]:
        return [np.array(self.windows.shape), self.sample()[1]]

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of some windows from all over, and the windows; the first and the last are among them."""
        count = max(2, min(MAX_WINDOWS, MAX_TOKENS // self.length))
        ids = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        return ids, self.windows[ids]


def tokens(
    path: str | Path,
    vocabulary: int,
    length: int = 128,
    dtype: Dtype = "uint16",
    test: float = 0.1,
    test_path: str | Path | None = None,
) -> DataSplits:
    """A file of tokens as windows of `length`: numbers of `dtype` one after the other, or a vector in a .npy file.

    Numbers are little-endian and below `vocabulary`. The last `test` of the windows (rounded, at least one) is the test
    set, or all of the file `test_path`. Only a sample of up to 1024 windows is read here. Raises ValueError for a size
    that is no whole number of tokens, for too few windows, and for tokens outside the vocabulary.
    """
    errors = test_fraction_errors(test)
    given = {"length": length, "vocabulary": vocabulary}
    if errors := errors + [f"data.{key}={value}\n  valid: at least 1" for key, value in given.items() if value < 1]:
        raise ValueError("\n".join(errors))
    train = _vector(Path(path).expanduser(), dtype, length, vocabulary, 2 if test_path is None else 1)
    if test_path is not None:
        held = _vector(Path(test_path).expanduser(), dtype, length, vocabulary, 1)
        return DataSplits(TokenSource(train, length, vocabulary), TokenSource(held, length, vocabulary), vocabulary)
    windows = (len(train) - 1) // length
    cut = length * (windows - min(max(1, round(test * windows)), windows - 1))
    return DataSplits(
        TokenSource(train[: cut + 1], length, vocabulary), TokenSource(train[cut:], length, vocabulary), vocabulary
    )


def _vector(path: Path, dtype: Dtype, length: int, vocabulary: int, windows: int) -> np.ndarray:
    """The tokens of a file, mapped: at least so many windows."""
    with naming_file_in_errors(path):
        try:
            found = _npy(path) if path.suffix == ".npy" else _raw(path, dtype)
        except OSError as error:
            raise ValueError(f"{path.absolute()} cannot be read: {error.strerror or error}") from error
        if len(found) < windows * length + 1:
            raise ValueError(
                f"{len(found)} tokens are too few: {windows} windows of {length} need {windows * length + 1}.\n"
                "take a longer file, or set data.length="
            )
        sampled = TokenSource(found, length, vocabulary)
        ids, rows = sampled.sample()
        if rows.max() >= vocabulary:
            raise ValueError(_out_of_vocabulary(rows, ids * length, vocabulary))
        return found


def _raw(path: Path, dtype: Dtype) -> np.ndarray:
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    if size % kind.itemsize:
        raise ValueError(f"{size} bytes are no whole number of {dtype} tokens: cut short, or of another data.dtype")
    return np.memmap(path, kind, "r") if size else np.empty(0, kind)


def _npy(path: Path) -> np.ndarray:
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.ndim != 1 or found.dtype.kind != "u":
        raise ValueError(f"{found.dtype} {list(found.shape)}, where tokens are a vector of uint16 or uint32")
    return found


def _out_of_vocabulary(rows: np.ndarray, starts: np.ndarray, vocabulary: int) -> str:
    row, place = np.unravel_index(rows.argmax(), rows.shape)
    return (
        f"token {starts[row] + place} is {rows[row, place]}, outside data.vocabulary={vocabulary}.\n"
        "set data.vocabulary= to that of the tokenizer, or data.dtype= to that of the file"
    )
