"""Files of tokens: the windows, refusals, and that nothing else is read."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data import Iid, Source, TokenSource, fingerprint, tokens

TERABYTE = 1 << 40


def written(folder: Path, values: list[int], code: str = "H") -> Path:
    """Write a little-endian file with the standard library."""
    (folder / "tokens.bin").write_bytes(struct.pack(f"<{len(values)}{code}", *values))
    return folder / "tokens.bin"


def inputs_of(source: Source) -> list[int]:
    return source.fetch(torch.arange(len(source)))[0].flatten().tolist()


def refusal(*arguments: Any, **keys: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers check the message)
        tokens(*arguments, **keys)
    return str(error.value)


class TestWindows:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(length=st.integers(1, 12), size=st.integers(25, 200), test=st.floats(0.01, 0.99), code=st.sampled_from("HI"))
    def test_tile_the_file_and_the_last_are_the_test(
        self, tmp_path: Path, length: int, size: int, test: float, code: str
    ) -> None:
        values = [number * 317 % 65_000 for number in range(size)]
        dtype = {"H": "uint16", "I": "uint32"}[code]
        splits = tokens(written(tmp_path, values, code), 65_000, length, dtype, test)  # type: ignore[arg-type]
        windows = (size - 1) // length
        assert len(splits.test) == min(max(1, round(test * windows)), windows - 1)
        assert inputs_of(splits.train) + inputs_of(splits.test) == values[: windows * length]
        inputs, targets = splits.test.fetch(torch.tensor([len(splits.test) - 1]))
        assert targets[0, -1].item() == values[windows * length]
        assert torch.equal(inputs[0, 1:], targets[0, :-1])
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.is_contiguous() and targets.is_contiguous()

    def test_a_vector_of_numpy_and_a_test_file_of_its_own(self, tmp_path: Path) -> None:
        np.save(tmp_path / "train.npy", np.arange(70_000, 70_041, dtype=np.uint32))
        np.save(tmp_path / "test.npy", np.arange(21, dtype=np.uint16))
        splits = tokens(tmp_path / "train.npy", 80_000, 10, test_path=tmp_path / "test.npy")
        assert (len(splits.train), len(splits.test), splits.classes) == (4, 2, 80_000)
        assert inputs_of(splits.train) == [*range(70_000, 70_040)] and inputs_of(splits.test) == [*range(20)]

    def test_an_empty_batch_has_the_shape_of_a_full_one(self) -> None:
        inputs, targets = TokenSource(np.arange(9, dtype=np.uint16), 4, 9).fetch(torch.empty(0, dtype=torch.int64))
        assert inputs.shape == targets.shape == (0, 4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({}, "42 tokens are too few: 2 windows of 128 need 257"),
            ({"length": 8, "vocabulary": 30}, "token 40 is 40, outside data.vocabulary=30"),
            (
                {"length": 8, "vocabulary": 1 << 20, "dtype": "uint32"},
                "token 16 is 2162720, outside",
            ),
            ({"length": 0, "vocabulary": 0, "test": 1.0}, "data.test=1.0: the fraction of the test set"),
            ({"length": 0, "vocabulary": 0, "test": 1.0}, "data.length=0\n  valid: at least 1\ndata.vocabulary=0"),
        ],
    )
    def test_files_that_differ_from_their_description(self, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
        path = written(tmp_path, [*range(42)])
        assert message in refusal(path, **({"vocabulary": 50} | keys))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read: No such file"),
            (b"", "0 tokens are too few"),
            (bytes(999), "999 bytes are not a whole number of uint16 tokens: cut short"),
            (b"\xff" * 1000, "token 0 is 65535, outside data.vocabulary=300"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, content: bytes | None, message: str) -> None:
        if content is not None:
            (tmp_path / "tokens.bin").write_bytes(content)
        assert message in refusal(tmp_path / "tokens.bin", 300, 8)

    @pytest.mark.parametrize(("wide", "dtype"), [("uint32", "uint16"), ("int64", "uint16"), ("int64", "uint32")])
    @pytest.mark.parametrize("length", [7, 16])
    def test_wider_tokens_than_described_are_noticed(self, tmp_path: Path, wide: str, dtype: Any, length: int) -> None:
        """Numpy's default is int64: read as uint16, three tokens of four would be 0."""
        np.random.default_rng(0).integers(0, 300, 2000).astype(wide).tofile(tmp_path / "wide.bin")
        text = refusal(tmp_path / "wide.bin", 300, length, dtype)
        assert f"every second {dtype} is 0, as in a file of wider numbers" in text and "set data.dtype=uint32" in text
        if wide == "uint32":
            assert tokens(tmp_path / "wide.bin", 300, length, "uint32").train.fetch(torch.arange(9))[0].any()

    def test_narrower_tokens_than_described_are_outside_the_vocabulary(self, tmp_path: Path) -> None:
        np.random.default_rng(0).integers(0, 300, 2000).astype("<u2").tofile(tmp_path / "narrow.bin")
        assert "outside data.vocabulary=300" in refusal(tmp_path / "narrow.bin", 300, 16, "uint32")

    def test_a_vocabulary_needs_a_dtype_that_has_it(self, tmp_path: Path) -> None:
        path = written(tmp_path, [*range(400)])
        assert len(tokens(path, 65_536, 16).train) == 22
        assert "data.vocabulary=65537, and uint16 has only 65536: set data.dtype=uint32" in refusal(path, 65_537, 16)

    def test_zeros_may_be_tokens(self, tmp_path: Path) -> None:
        """A padded file ends with them, and a .npy file knows its dtype."""
        assert tokens(written(tmp_path, [5, 6, 7] + [0] * 397), 8, 16)
        np.save(
            tmp_path / "every-second.npy", np.arange(400, dtype=np.uint16) * (np.arange(400, dtype=np.uint16) % 2 == 0)
        )
        assert tokens(tmp_path / "every-second.npy", 400, 16)

    @pytest.mark.parametrize("values", [np.zeros((9, 9), np.uint16), np.zeros(99), np.zeros(99, np.int64)])
    def test_arrays_of_something_else(self, tmp_path: Path, values: np.ndarray) -> None:
        np.save(tmp_path / "tokens.npy", values)
        assert "tokens must be a vector of uint16 or uint32" in refusal(tmp_path / "tokens.npy", 300, 8)

    def test_an_array_cut_short(self, tmp_path: Path) -> None:
        np.save(tmp_path / "tokens.npy", np.zeros(999, np.uint16))
        content = (tmp_path / "tokens.npy").read_bytes()
        (tmp_path / "tokens.npy").write_bytes(content[:-7])
        assert "data.path=" in refusal(tmp_path / "tokens.npy", 300, 8)

    def test_a_token_outside_the_sample_is_checked_when_it_is_fetched(self) -> None:
        values = np.zeros(100_000, np.uint16)
        values[33_333] = 7
        source = TokenSource(values, 4, 7)
        with pytest.raises(ValueError, match=r"token 33333 is 7, outside data\.vocabulary=7"):
            source.fetch(torch.arange(len(source)))


def test_a_file_larger_than_memory_takes_none(tmp_path: Path) -> None:
    """A sparse terabyte with marks in it: the marks are read, and most of the memory is for the ids of windows."""
    path, length = tmp_path / "sparse.bin", 1 << 18
    with path.open("wb") as file:
        file.truncate(TERABYTE)
        file.seek(TERABYTE // 2)
        file.write(struct.pack("<3H", 7, 8, 9))
    tracemalloc.start()
    splits = tokens(path, 10, length)
    clients = Iid().split(splits.train, splits.test, 4, 0)
    checksum = fingerprint(splits, clients)
    inputs, targets = splits.train.fetch(torch.tensor([3, TERABYTE // 4 // length, 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    windows = (TERABYTE // 2 - 1) // length
    assert len(splits.train) + len(splits.test) == windows and checksum
    assert inputs.sum(1).tolist() == [0, 24, 0] and targets[1, :2].tolist() == [8, 9]
    assert peak < 100 * windows + 40 * length + (32 << 20)
