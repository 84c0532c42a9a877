"""Columns of a file as a data set, and .npz files written by numpy."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import DataSplits, Iid, Source, npz
from trainer.data.readers.test_split import draw_test_mask

GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.normal(size=(40, 3))


def written(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def all_of(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    return source.fetch(torch.arange(len(source)))


def refusal(path: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match="^" + re.escape(f"data.path={path} cannot be used:\n")) as error:
        npz(path, **keys)
    return str(error.value)


def together(splits: DataSplits) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets of the training set followed by the test set."""
    parts = [all_of(splits.train), all_of(splits.test)]
    return tuple(torch.cat(column).numpy() for column in zip(*parts, strict=True))  # type: ignore[return-value]


class TestTestMask:
    @settings(max_examples=100, deadline=None)
    @given(examples=st.integers(2, 200), test=st.floats(0.01, 0.99))
    def test_both_sides_get_at_least_one(self, examples: int, test: float) -> None:
        held = draw_test_mask(examples, test)
        assert held.sum() == min(max(1, np.rint(test * examples)), examples - 1)
        assert np.array_equal(held, draw_test_mask(examples, test))

    @settings(max_examples=100, deadline=None)
    @given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=60), test=st.floats(0.01, 0.99))
    def test_every_group_gives_its_fraction_and_keeps_one(self, groups: list[int], test: float) -> None:
        held = draw_test_mask(len(groups), test, np.array(groups))
        for group in set(groups):
            members = held[np.array(groups) == group]
            assert members.sum() == min(np.rint(test * len(members)), len(members) - 1)


class TestNpz:
    def test_every_example_is_trained_or_tested_with(self, tmp_path: Path) -> None:
        labels = np.arange(40) % 4
        splits = npz(written(tmp_path, x=FEATURES, y=labels), test=0.25)
        assert (len(splits.train), len(splits.test), splits.classes) == (30, 10, 4)
        inputs, targets = together(splits)
        assert inputs.dtype == np.float32 and targets.dtype == np.int64
        order, wanted = np.argsort(inputs[:, 0]), np.argsort(FEATURES[:, 0])
        assert np.array_equal(inputs[order], FEATURES[wanted].astype(np.float32))
        assert np.array_equal(targets[order], labels[wanted])

    @pytest.mark.parametrize("name", ["val", "valid", "validation"])
    def test_a_validation_set_of_its_own(self, tmp_path: Path, name: str) -> None:
        """Without a test set it takes its place, as in a DatasetDict."""
        arrays = {"x_train": FEATURES, "y_train": ["a", "b"] * 20, f"x_{name}": FEATURES[:6], f"y_{name}": ["b"] * 6}
        splits = npz(written(tmp_path, **arrays))
        assert not splits.has_validation and len(splits.test) == 6
        splits = npz(written(tmp_path, **arrays, x_test=FEATURES[:5], y_test=["a"] * 5))
        assert [len(source) for source in splits.parts.values()] == [40, 5, 6] and splits.has_validation
        inputs, targets = all_of(splits.validation)
        assert np.array_equal(inputs, FEATURES[:6].astype(np.float32)) and targets.tolist() == [1] * 6
        splits = splits.without_validation()
        assert splits.validation is splits.train and list(splits.parts) == ["train", "test"]

    @pytest.mark.parametrize(
        ("train", "validation", "text"),
        [
            (["a", "b"] * 20, ["a", "c"], "y_val: 1 of 2 examples are not among the classes a, b, such as c"),
            (np.arange(40) % 3, np.array([0, 3]), "y_val: 1 of 2 examples are outside 0..2, such as 3"),
            (np.arange(40) % 3, ["a", "b"], "y_val: <U1 [2]: unlike the targets of training, y_train: int64 [40]"),
            (["a", "b"] * 20, np.array([0, 1]), "y_val: int64 [2]: unlike the targets of training, y_train: <U1 [40]"),
        ],
    )
    def test_a_validation_set_of_other_classes(self, tmp_path: Path, train: Any, validation: Any, text: str) -> None:
        arrays = {"x_train": FEATURES, "y_train": train, "x_test": FEATURES, "y_test": train}
        path = written(tmp_path, **arrays, x_val=FEATURES[:2], y_val=validation)
        assert text in refusal(path)

    def test_numbers_stay_numbers_in_a_validation_set(self, tmp_path: Path) -> None:
        arrays = {"x_train": FEATURES, "y_train": FEATURES[:, 0], "x_test": FEATURES, "y_test": FEATURES[:, 0]}
        splits = npz(written(tmp_path, **arrays, x_val=FEATURES[:2], y_val=np.array([1, 2])))
        assert all_of(splits.validation)[1].tolist() == [1.0, 2.0] and splits.classes is None

    @pytest.mark.parametrize("pattern", ["{0}_{1}", "{1}_{0}"])
    def test_a_test_set_of_its_own_is_taken(self, tmp_path: Path, pattern: str) -> None:
        """The arrays are named as in keras, or as in MedMNIST, whose labels are [N, 1]."""
        images = GENERATOR.integers(0, 256, (7, 5, 4, 3), np.uint8)
        arrays = {pattern.format("images", "train"): images, pattern.format("images", "test"): images[:2]}
        arrays |= {pattern.format("labels", "train"): np.arange(7)[:, None] % 3}
        arrays |= {pattern.format("labels", "test"): np.array([[2], [1]], np.uint8)}
        splits = npz(written(tmp_path, **arrays), inputs="images", targets="labels")
        assert (len(splits.train), len(splits.test), splits.classes) == (7, 2, 3)
        inputs, targets = all_of(splits.test)
        assert targets.tolist() == [2, 1]
        assert np.allclose(inputs.numpy(), np.moveaxis(images[:2], 3, 1) / 255)

    @pytest.mark.parametrize("shape", [(6, 5, 4), (6, 3, 5, 4), (6, 5, 4, 3)])
    def test_bytes_of_images_become_numbers_to_one(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        images = GENERATOR.integers(0, 256, shape, np.uint8)
        inputs, _ = together(npz(written(tmp_path, x=images, y=np.zeros(6, int))))
        assert inputs.dtype == np.float32 and inputs.shape == (6, 1 if len(shape) == 3 else 3, 5, 4)
        assert inputs.sum() == pytest.approx(images.sum() / 255, rel=1e-5)

    @pytest.mark.parametrize(
        ("inputs", "dtype", "shape"),
        [
            (np.arange(12.0), torch.float32, (12, 1)),
            (np.arange(12), torch.float32, (12, 1)),
            (np.arange(24, dtype=np.int16).reshape(12, 2), torch.int64, (12, 2)),
            (np.arange(24, dtype=np.uint8).reshape(12, 2), torch.int64, (12, 2)),
            (np.ones((12, 2, 2), np.float16), torch.float32, (12, 2, 2)),
        ],
    )
    def test_numbers_and_integers(self, tmp_path: Path, inputs: np.ndarray, dtype: torch.dtype, shape: tuple) -> None:
        splits = npz(written(tmp_path, x=inputs, y=np.ones(12)))
        found, targets = all_of(splits.train)
        assert found.dtype == dtype and found.shape[1:] == shape[1:]
        assert splits.classes is None and targets.dtype == torch.float32

    def test_texts_are_labels_and_client_ids_by_their_names(self, tmp_path: Path) -> None:
        names = np.array(["dog", "cat", "fox"])[np.arange(30) % 3]
        path = written(tmp_path, x=np.arange(30.0), y=names, site=names)
        splits = npz(path, client_ids="site")
        assert splits.label_names == splits.client_names == ("cat", "dog", "fox")
        inputs, targets = all_of(splits.train)
        assert [splits.label_names[label] for label in targets] == names[inputs[:, 0].long()].tolist()
        assert np.array_equal(splits.train.client_ids, splits.train.labels)
        assert np.bincount(splits.test.client_ids).tolist() == [1, 1, 1]
        named = npz(path, classes=["fox", "dog", "cat", "owl"])
        assert named.classes == 4 and named.label_names[int(all_of(named.train)[1][0])] == names[0]

    def test_the_number_of_classes_can_be_set(self, tmp_path: Path) -> None:
        path = written(tmp_path, x=FEATURES, y=(np.arange(40) % 3).astype(float))
        assert npz(path).classes is None
        splits = npz(path, classes=5)
        assert splits.classes == 5 and splits.train.labels is not None

    @pytest.mark.parametrize(
        "change",
        [
            lambda array: array.astype(array.dtype.newbyteorder(">")),
            np.asfortranarray,
            lambda array: array.astype(np.float16) if array.dtype.kind == "f" else array.astype(np.int8),
        ],
        ids=["big-endian", "Fortran order", "half precision and int8"],
    )
    def test_layouts_of_arrays(self, tmp_path: Path, change: Any) -> None:
        features, labels = np.round(FEATURES * 8) / 8, np.arange(40) % 4
        splits = npz(written(tmp_path, x=change(features), y=change(labels)))
        inputs, targets = together(splits)
        wanted = features.astype(np.float32)
        order, expected = np.lexsort(inputs.T), np.lexsort(wanted.T)
        assert np.array_equal(inputs[order], wanted[expected])
        assert np.array_equal(np.bincount(targets), np.bincount(labels)) and splits.classes == 4

    def test_labels_may_have_gaps_and_occur_in_the_test_alone(self, tmp_path: Path) -> None:
        arrays = {"x_train": np.ones((4, 2)), "y_train": [0, 2, 2, 5], "x_test": np.ones((2, 2)), "y_test": [7, 0]}
        splits = npz(written(tmp_path, **arrays))
        assert splits.classes == 8 and all_of(splits.test)[1].tolist() == [7, 0]
        clients = Iid().split(splits.train, splits.test, 4, 0)
        assert sorted(np.concatenate(clients.train).tolist()) == [0, 1, 2, 3]

    def test_texts_in_either_form_of_unicode_are_one_class(self, tmp_path: Path) -> None:
        """The decomposed form is that of macOS, and of tables written on it."""
        arrays = {"x_train": np.ones((2, 1)), "y_train": ["café", "tea"], "x_test": np.ones((2, 1))}
        path = written(tmp_path, **arrays, y_test=["cafe\u0301", "tea"])
        splits = npz(path)
        assert splits.label_names == ("café", "tea") and all_of(splits.test)[1].tolist() == [0, 1]
        assert npz(path, classes=["tea", "cafe\u0301"]).label_names == ("tea", "café")
        arrays |= {"site_train": ["é", "e\u0301"], "site_test": ["e\u0301", "é"], "y_test": ["tea", "tea"]}
        assert npz(written(tmp_path, **arrays), client_ids="site").client_names == ("é",)


class TestLimits:
    """The few bytes of a header may claim any number of bytes of memory."""

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("claimed", ["(9999999999999999,)", "(99999,)"])
    def test_a_header_that_claims_more_than_the_file(self, tmp_path: Path, save: Any, claimed: str) -> None:
        save(tmp_path / "whole.npz", x=np.zeros(40), y=np.zeros(40))
        with ZipFile(tmp_path / "whole.npz") as whole, ZipFile(tmp_path / "data.npz", "w") as claims:
            for name in whole.namelist():
                content = whole.read(name)
                place, end = content.index(b"(40,)"), content.index(b"\n")
                header = content[:place] + claimed.encode() + b", }"
                claims.writestr(name, header.ljust(end) + content[end:])
        assert re.search(r"x: its header claims float64 \[9+\], and it has \d+ B", refusal(tmp_path / "data.npz"))

    def test_an_array_of_more_than_the_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        np.savez_compressed(tmp_path / "data.npz", x=np.zeros(40), y=np.zeros(40, int))
        assert len(npz(tmp_path / "data.npz").train) == 36
        monkeypatch.setattr("trainer.data.readers.limits.psutil.virtual_memory", lambda: SimpleNamespace(total=319))
        assert "x: the array: 320 B unpacked, and this machine has 319 B of memory" in refusal(tmp_path / "data.npz")


class TestRefusals:
    def test_all_errors_are_reported_at_once(self, tmp_path: Path) -> None:
        holed = FEATURES.copy()
        holed[[3, 7], [0, 2]] = np.nan, np.inf
        labels = np.arange(39) % 4
        labels[5] = -1
        message = refusal(written(tmp_path, x=holed, y=labels, site=np.ones(40)), classes=3, client_ids="site", test=1)
        for error in (
            "lengths differ: 40 x, 39 y, 40 site",
            "x: 2 of 40 examples are missing (NaN) or not finite in float32; the first is example 3",
            "y: 10 of 39 examples are outside 0..2, such as 3; the first is example 3",
            "site: float64 [40]: client ids must be integers or texts",
            "data.test=1: ",
        ):
            assert error in message, message

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": [["a", "b"]], "y": [1]}, "x: <U1 [1, 2]: inputs must be numbers"),
            ({"x": np.zeros((2, 5, 5, 5), np.uint8), "y": [1, 2]}, "uint8 of shape [2, 5, 5, 5] is not images"),
            ({"x": [1e300, 1], "y": [1, 2]}, "not finite in float32; the first is example 0"),
            ({"x": [1.0], "y": [1j]}, "y: complex128 [1]: targets must be numbers or texts"),
            ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "x: there are no examples"),
            ({"x": 1.0, "y": [1, 2]}, "lengths differ: 1 x, 2 y"),
            ({"x": [1.0], "z": [1]}, "y: there is no such array\n  valid: x, z\n  set data.inputs="),
            ({"x": [1.0], "y": np.array([{}], object)}, "y: Object arrays cannot be loaded"),
            ({"x_train": [1.0], "y_train": [1], "x_test": [1.0]}, "y_test: there is no such array"),
            (
                {"x_train": np.ones((2, 3)), "y_train": [1, 2], "x_test": np.ones((2, 4)), "y_test": [1, 2]},
                "the examples have different shapes: x_train: float64 [2, 3], x_test: float64 [2, 4]",
            ),
        ],
    )
    def test_arrays_that_cannot_be_used(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        assert message in refusal(written(tmp_path, **arrays))

    def test_names_that_are_not_the_classes(self, tmp_path: Path) -> None:
        path = written(tmp_path, x=np.ones(3), y=["cat", "dog", "cat"])
        assert "1 of 3 examples are not among the classes cat, fox, such as dog" in refusal(
            path, classes=["cat", "fox"]
        )

    @pytest.mark.parametrize(
        ("corrupt", "message"),
        [
            (lambda content: content[: len(content) // 2], "not a .npz file, or cut short"),
            (lambda content: b"<html>not found", "not a .npz file, or cut short"),
            (lambda content: content.replace(FEATURES.tobytes(), FEATURES[::-1].tobytes()), "x: Bad CRC-32"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, corrupt: Any, message: str) -> None:
        path = written(tmp_path, x=FEATURES, y=np.arange(40))
        path.write_bytes(corrupt(path.read_bytes()))
        assert message in refusal(path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert re.search(r"/mine.npz cannot be read: No such file", refusal(tmp_path / "mine.npz"))
