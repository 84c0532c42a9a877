"""Weights of examples, from files and from DataSplits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, disable_progress_bars

from trainer.data import DataSplits, TensorSource, checksum, npz, parquet, saved_dataset

WEIGHTS = np.arange(20.0) + 1
LABELS = np.arange(20) % 3


def as_npz(folder: Path, weights: Any) -> DataSplits:
    np.savez(folder / "data.npz", x=WEIGHTS, y=LABELS, w=weights)
    return npz(folder / "data.npz", weights="w")


def as_parquet(folder: Path, weights: Any, **keys: Any) -> DataSplits:
    pq.write_table(pa.table({"x": WEIGHTS, "label": LABELS, "w": weights}), folder / "data.parquet")
    return parquet(folder / "data.parquet", weights="w", **keys)


def as_saved(folder: Path, weights: Any) -> DataSplits:
    disable_progress_bars()
    columns = {"x": WEIGHTS.tolist(), "label": LABELS.tolist(), "w": weights.tolist()}
    Dataset.from_dict(columns).save_to_disk(folder / "data")
    return saved_dataset(folder / "data", weights="w")


@pytest.mark.parametrize("read", [as_npz, as_parquet, as_saved])
def test_weights_stay_with_their_examples(read: Any, tmp_path: Path) -> None:
    """An example's only input is its weight; the test set needs no weights."""
    splits = read(tmp_path, WEIGHTS)
    inputs, _ = splits.train.fetch(torch.arange(len(splits.train)))
    assert splits.weights is not None and splits.weights.dtype == np.float32
    assert inputs.shape == (18, 1) and splits.weights.tolist() == inputs[:, 0].tolist()


def test_a_test_set_of_its_own_needs_no_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x_train=WEIGHTS, y_train=LABELS, w_train=WEIGHTS, x_test=WEIGHTS, y_test=LABELS)
    splits = npz(tmp_path / "data.npz", weights="w")
    assert splits.weights is not None and splits.weights.tolist() == WEIGHTS.tolist()


def test_windows_of_tokens_have_weights(tmp_path: Path) -> None:
    rows = [[row, row, row] for row in range(20)]
    pq.write_table(pa.table({"ids": rows, "w": np.arange(20.0)}), tmp_path / "data.parquet")
    splits = parquet(tmp_path / "data.parquet", targets=None, weights="w")
    inputs, _ = splits.train.fetch(torch.arange(len(splits.train)))
    assert splits.weights is not None and splits.weights.tolist() == inputs[:, 0].tolist()


BAD = {
    "negative": (np.where(WEIGHTS == 3, -2, WEIGHTS), "w: 1 of 20 examples are negative, such as -2"),
    "missing": (np.where(WEIGHTS == 3, np.nan, WEIGHTS), "w: 1 of 20 examples are missing (NaN) or not finite"),
    "infinite": (np.where(WEIGHTS == 3, np.inf, WEIGHTS), "w: 1 of 20 examples are missing (NaN) or not finite"),
    "all zero": (np.zeros(20), "w: all weights are 0"),
    "too few": (WEIGHTS[:19], "lengths differ: 20 x, 20 y, 19 w"),
    "a matrix": (np.ones((20, 2)), "w: float64 [20, 2]: weights must be one number per example"),
    "texts": (np.array(["much"] * 20), "w: <U4 [20]: weights must be one number per example"),
}


@pytest.mark.parametrize(("weights", "message"), BAD.values(), ids=BAD.keys())
def test_bad_weights_are_reported_with_the_other_errors(tmp_path: Path, weights: np.ndarray, message: str) -> None:
    labels = np.where(WEIGHTS == 5, -1, LABELS)
    np.savez(tmp_path / "data.npz", x=WEIGHTS, y=labels, w=weights)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        npz(tmp_path / "data.npz", weights="w")
    assert "y: 1 of 20 examples are outside" in str(error.value)


def test_a_missing_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": WEIGHTS, "label": LABELS, "w": WEIGHTS}), tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="v: there is no such column; valid: x, label"):
        parquet(tmp_path / "data.parquet", weights="v", inputs="x")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"weights: float64 \[2\] for 3 training examples"),
        ([1.0, -2.0, 1.0], "weights: 1 of 3 examples are negative"),
        ([0, 0, 0], "weights: all weights are 0"),
    ],
)
def test_splits_refuses_them(weights: list[float], message: str) -> None:
    source = TensorSource(torch.zeros(3, 1), torch.arange(3))
    with pytest.raises(ValueError, match=message):
        DataSplits(source, source, 3, weights=np.array(weights))


def test_other_weights_are_another_data_set() -> None:
    source = TensorSource(torch.zeros(3, 1), torch.arange(3))
    checksums = [
        checksum(DataSplits(source, source, 3, weights=weights)) for weights in (None, np.ones(3), np.arange(3))
    ]
    assert len(set(checksums)) == 3
