"""Reader of files of tokens, memory-mapped: only windows that are used are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.readers.cache import name_file_in_errors
from trainer.data.readers.test_split import test_fraction_errors
from trainer.data.sources.base import DataSplits
from trainer.data.sources.text_format import TextFormat
from trainer.data.tokenization.token_file import Dtype, TokenFileInfo, description_path, read_description
from trainer.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from trainer.utils.errors import ErrorCollector, raise_errors

MAX_WINDOWS, MAX_TOKENS = 1024, 1 << 20  # checked before training; every window is checked when it is fetched


class TokenSource:
    """Source of windows of tokens, usually memory-mapped; the targets are the inputs shifted by one.

    Window i starts at token i * length; its targets reach one token further. A tail shorter than a window is dropped.
    Batches are int64 [B, length].

    Args:
        tokens: vector of integers below `vocabulary`.
        length: tokens of a window.
        vocabulary: number of different tokens.

    Raises:
        ValueError: `fetch` reads a token outside the vocabulary.
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
        """Return the ids of evenly spaced windows, the first and the last among them, and the windows."""
        count = max(2, min(MAX_WINDOWS, MAX_TOKENS // self.length))
        ids = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        return ids, self.windows[ids]


def tokens(
    path: str | Path,
    vocabulary: int,
    length: int = 128,
    dtype: Dtype | None = None,
    test: float = 0.1,
    test_path: str | Path | None = None,
    validation_path: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> DataSplits:
    """Read a file of tokens as windows. Only a sample of up to 1024 windows is checked here.

    Args:
        path: a file of little-endian numbers without a header, described by FILE.json beside it or not, or a vector in
            a .npy file.
        vocabulary: number of different tokens; tokens are below it.
        length: tokens of a window.
        dtype: dtype of the numbers, without effect on .npy files; None: as described, or else uint16.
        test: fraction of the windows (rounded, at least one) at the end of the file that is the test set.
        test_path: a file of test tokens instead.
        validation_path: a file of validation tokens.
        tokenizer: of the tokens, for samples of text and for bits a byte.

    Raises:
        ValueError: the size is not a whole number of tokens, the tokens seem to be wider than `dtype`, there are too
            few windows, a token is outside the vocabulary, or the file is not as it is described.
    """
    given = {"length": length, "vocabulary": vocabulary}
    errors = [f"data.{key}={value}\n  valid: at least 1" for key, value in given.items() if value < 1]
    raise_errors(test_fraction_errors(test) + errors)
    collector = ErrorCollector()
    known = None if tokenizer is None else collector.collect(lambda: load_tokenizer(tokenizer))
    paths = [Path(path).expanduser()] + ([] if test_path is None else [Path(test_path).expanduser()])
    parts = [
        collector.collect(lambda part=part: _map(part, dtype, length, vocabulary, 3 - len(paths), known))
        for part in paths
    ]
    collector.raise_any()
    train_tokens, test_tokens = parts[0], parts[-1]
    if test_path is None:
        windows = (len(train_tokens) - 1) // length
        boundary = length * (windows - min(max(1, round(test * windows)), windows - 1))
        train_tokens, test_tokens = train_tokens[: boundary + 1], train_tokens[boundary:]
    parts = {"train": train_tokens, "test": test_tokens}
    if validation_path is not None:
        parts["validation"] = _map(Path(validation_path).expanduser(), dtype, length, vocabulary, 1, known)
    sources = {part: TokenSource(vector, length, vocabulary) for part, vector in parts.items()}
    text_format = known and token_format(known, length, vocabulary)
    splits = DataSplits(sources["train"], sources["test"], vocabulary, text_format=text_format)
    return splits.with_parts(**sources)


def token_format(tokenizer: Tokenizer, length: int, vocabulary: int) -> TextFormat:
    """Return the format of a corpus of this tokenizer, in windows of `length` tokens below `vocabulary`."""
    sizes, end = tokenizer.token_bytes, tokenizer.end
    return TextFormat(
        encode=lambda text: tokenizer.encode([text])[0],
        decode=tokenizer.decode,
        length=length,
        end=frozenset() if end is None else frozenset({end}),
        token_bytes=None if sizes is None else np.pad(sizes, (0, vocabulary - len(sizes))),
    )


def _map(
    path: Path, dtype: Dtype | None, length: int, vocabulary: int, windows: int, tokenizer: Tokenizer | None
) -> np.ndarray:
    """Memory-map the tokens of a file, and check a sample of them; there must be `windows` windows."""
    with name_file_in_errors(path):
        info = read_description(path)
        raise_errors(_description_errors(info, path, dtype, vocabulary, tokenizer))
        dtype = info.dtype if info else dtype or "uint16"
        try:
            vector = _map_npy(path) if path.suffix == ".npy" else _map_raw(path, dtype, vocabulary)
        except OSError as error:
            raise ValueError(f"{path.absolute()} cannot be read: {error.strerror or error}") from error
        if len(vector) < windows * length + 1:
            raise ValueError(
                f"{len(vector)} tokens are too few: {windows} windows of {length} need {windows * length + 1}.\n"
                "take a longer file, or set a smaller data.length="
            )
        ids, rows = TokenSource(vector, length, vocabulary).sample()
        if rows.max() >= vocabulary:
            raise ValueError(_out_of_vocabulary(rows, ids * length, vocabulary))
        if path.suffix != ".npy" and _is_every_second_zero(rows, ids * length):
            raise ValueError(
                f"every second {dtype} is 0, as in a file of wider numbers.\n"
                "set data.dtype=uint32, or save the tokens as uint16, uint32, or .npy, which knows its dtype"
            )
        return vector


def _description_errors(
    info: TokenFileInfo | None, path: Path, dtype: Dtype | None, vocabulary: int, tokenizer: Tokenizer | None
) -> list[str]:
    """Return what differs between a file, its description, and the keys."""
    errors = []
    if tokenizer and tokenizer.vocabulary > vocabulary:
        errors.append(
            f"data.vocabulary={vocabulary}, and data.tokenizer={tokenizer.path} has {tokenizer.vocabulary} tokens.\n"
            f"set data.vocabulary={tokenizer.vocabulary} or more"
        )
    if info is None:
        return errors
    described = description_path(path).name
    if dtype not in (None, info.dtype):
        errors.append(f"data.dtype={dtype}, and {described} says {info.dtype}: leave data.dtype out")
    if info.vocabulary > vocabulary:
        errors.append(f"data.vocabulary={vocabulary}, and {described} says {info.vocabulary}: set that, or more")
    if tokenizer and tokenizer.fingerprint != info.tokenizer:
        errors.append(f"data.tokenizer={tokenizer.path} is not the tokenizer that {described} says: set the other one")
    size = path.stat().st_size if path.exists() else 0
    if path.exists() and size != info.tokens * np.dtype(info.dtype).itemsize:
        errors.append(f"{size} bytes are not the {info.tokens} {info.dtype} tokens that {described} says: cut short?")
    return errors


def _map_raw(path: Path, dtype: Dtype, vocabulary: int) -> np.ndarray:
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    if vocabulary > (limit := np.iinfo(kind).max + 1):
        raise ValueError(f"data.vocabulary={vocabulary}, and {dtype} has only {limit}: set data.dtype=uint32")
    if size % kind.itemsize:
        raise ValueError(f"{size} bytes are not a whole number of {dtype} tokens: cut short, or of another data.dtype")
    return np.memmap(path, kind, "r") if size else np.empty(0, kind)


def _is_every_second_zero(rows: np.ndarray, starts: np.ndarray) -> bool:
    """Return whether the windows have zeros at all odd positions of the file, as the upper halves of small numbers."""
    is_odd = (starts[:, None] + np.arange(rows.shape[1])) % 2 == 1
    return bool(rows.any()) and not rows[is_odd].any()


def _map_npy(path: Path) -> np.ndarray:
    vector = np.load(path, mmap_mode="r", allow_pickle=False)
    if vector.ndim != 1 or vector.dtype.kind != "u":
        raise ValueError(f"{vector.dtype} {list(vector.shape)}: tokens must be a vector of uint16 or uint32")
    return vector


def _out_of_vocabulary(rows: np.ndarray, starts: np.ndarray, vocabulary: int) -> str:
    row, column = np.unravel_index(rows.argmax(), rows.shape)
    return (
        f"token {starts[row] + column} is {rows[row, column]}, outside data.vocabulary={vocabulary}.\n"
        "set data.vocabulary= to that of the tokenizer, or data.dtype= to that of the file"
    )
