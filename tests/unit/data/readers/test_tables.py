"""Parquet files written by pyarrow, CSV and JSON lines by the standard library, and data sets saved by `datasets`."""

from __future__ import annotations

import csv as csv_module
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trainer.data import DataSplits, Source, csv, jsonl, parquet, saved_dataset

GENERATOR = np.random.default_rng(0)
POINTS = GENERATOR.normal(size=(40, 3))


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def written(folder: Path, **columns: Any) -> Path:
    """Write a Parquet file in groups of few rows."""
    pq.write_table(pa.table(columns), folder / "data.parquet", row_group_size=7)
    return folder / "data.parquet"


def all_of(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    return source.fetch(torch.arange(len(source)))


def together(splits: DataSplits) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and targets, sorted by the first number of an input."""
    inputs, targets = (torch.cat(pair).numpy() for pair in zip(all_of(splits.train), all_of(splits.test), strict=True))
    order = np.argsort(inputs.reshape(len(inputs), -1)[:, 0])
    return inputs[order], targets[order]


def refusal(read: Any, path: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match="^" + re.escape(f"data.path={path} cannot be used:\n")) as error:
        read(path, **keys)
    return str(error.value)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


class TestParquet:
    def test_named_columns_of_numbers_are_stacked(self, tmp_path: Path) -> None:
        labels = np.arange(40) % 3
        path = written(tmp_path, a=POINTS[:, 0], b=POINTS[:, 1].astype(np.float32), label=labels, id=np.arange(40))
        splits = parquet(path, inputs=["a", "b"], test=0.25)
        assert (len(splits.train), len(splits.test), splits.classes) == (30, 10, 3)
        inputs, targets = together(splits)
        order = np.argsort(POINTS[:, 0])
        assert np.array_equal(inputs, POINTS[order, :2].astype(np.float32)) and np.array_equal(targets, labels[order])
        assert all_of(parquet(path).train)[0].shape[1] == 3, "all columns but the label"

    @pytest.mark.parametrize(
        "kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)], ids=str
    )
    def test_lists_of_numbers(self, tmp_path: Path, kind: pa.DataType) -> None:
        path = written(tmp_path, x=pa.array(POINTS.tolist(), kind), label=["b", "a"] * 20)
        splits = parquet(path)
        assert splits.label_names == ("a", "b")
        assert np.array_equal(together(splits)[0], POINTS[np.argsort(POINTS[:, 0])].astype(np.float32))

    def test_lists_of_lists_of_bytes_are_images(self, tmp_path: Path) -> None:
        images = GENERATOR.integers(0, 256, (10, 4, 5), np.uint8)
        path = written(tmp_path, image=pa.array(images.tolist(), pa.list_(pa.list_(pa.uint8()))), label=np.arange(10))
        inputs, _ = together(parquet(path))
        assert inputs.shape == (10, 1, 4, 5) and inputs.sum() == pytest.approx(images.sum() / 255, rel=1e-5)

    def test_encoded_images_are_decoded(self, tmp_path: Path) -> None:
        images = GENERATOR.integers(0, 256, (10, 4, 5, 3), np.uint8)
        path = written(tmp_path, image=[png(image) for image in images], label=np.arange(10))
        inputs, _ = together(parquet(path))
        assert inputs.shape == (10, 3, 4, 5) and inputs.sum() == pytest.approx(images.sum() / 255, rel=1e-5)

    def test_tensors_of_arrow(self, tmp_path: Path) -> None:
        images = GENERATOR.normal(size=(10, 2, 3)).astype(np.float32)
        path = written(tmp_path, x=pa.FixedShapeTensorArray.from_numpy_ndarray(images), label=np.arange(10))
        assert together(parquet(path))[0].shape == (10, 2, 3)

    def test_dictionaries_are_labels_and_client_ids(self, tmp_path: Path) -> None:
        animals = pa.array(["dog", "cat"] * 20).dictionary_encode()
        splits = parquet(
            written(tmp_path, x=POINTS[:, 0], animal=animals, site=animals), targets="animal", client_ids="site"
        )
        assert splits.label_names == splits.client_names == ("cat", "dog")
        assert np.array_equal(splits.train.labels, splits.train.client_ids)

    def test_rows_of_tokens_are_their_own_targets(self, tmp_path: Path) -> None:
        rows = np.arange(60).reshape(12, 5)
        splits = parquet(written(tmp_path, input_ids=rows.tolist()), targets=None, inputs="input_ids")
        inputs, targets = together(splits)
        assert splits.classes == 60 and np.array_equal(inputs, rows[:, :-1]) and np.array_equal(targets, rows[:, 1:])

    def test_rows_of_tokens_may_have_natural_clients(self, tmp_path: Path) -> None:
        rows, sites = np.arange(60).reshape(12, 5), ["a", "b", "c"] * 4
        path = written(tmp_path, ids=rows.tolist(), site=sites)
        splits = parquet(path, targets=None, inputs="ids", client_ids="site", test=0.25)
        assert splits.client_names == ("a", "b", "c")
        for source, each in ((splits.train, 3), (splits.test, 1)):
            assert source.client_ids is not None and np.bincount(source.client_ids).tolist() == [each] * 3
            assert np.array_equal(all_of(source)[0][:, 0] // 5 % 3, source.client_ids)

    def test_a_folder_of_files_and_a_test_file(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        for number in range(3):
            pq.write_table(
                pa.table({"x": POINTS[:, number], "label": np.arange(40) % 2}), tmp_path / f"train/{number}.parquet"
            )
        path = written(tmp_path, x=POINTS[:9, 0], label=[1.5] * 9)
        splits = parquet(tmp_path / "train", test_path=path, classes=None, targets="label")
        assert (len(splits.train), len(splits.test), splits.classes) == (120, 9, None)

    @pytest.mark.parametrize("column", ["__index_level_0__", "__index_level_12__", "Unnamed: 0", ""])
    def test_the_index_of_pandas_is_no_input(self, tmp_path: Path, column: str) -> None:
        """It numbers the examples, so that a sorted table would tell its labels."""
        path = written(
            tmp_path, **{column: np.arange(40), "x": POINTS[:, 0], "y": POINTS[:, 1], "label": np.arange(40) % 2}
        )
        assert together(parquet(path))[0].shape == (40, 2)
        assert together(parquet(path, inputs=[column, "x"]))[0].shape == (40, 2)
        assert len(together(parquet(path, inputs=[column]))[0]) == 40

    def test_an_index_with_a_name_is_no_input(self, tmp_path: Path) -> None:
        """Pandas keeps the names of index columns, and the range of an index that is no column, with the table."""
        index = json.dumps({"index_columns": ["patient", {"kind": "range", "start": 0}], "columns": []})
        table = pa.table({"patient": np.arange(40), "x": POINTS[:, 0], "label": np.arange(40) % 2})
        pq.write_table(table.replace_schema_metadata({"pandas": index}), tmp_path / "named.parquet")
        assert together(parquet(tmp_path / "named.parquet"))[0].shape == (40, 1)

    def test_a_table_of_targets_alone(self, tmp_path: Path) -> None:
        message = refusal(parquet, written(tmp_path, __index_level_0__=np.arange(4), label=[0, 1, 0, 1]))
        assert "there is no column of inputs; its columns: __index_level_0__, label" in message

    def test_folders_as_spark_and_hive_write_them(self, tmp_path: Path) -> None:
        """Marks and checksums are no tables, a file may have int32 where another has int64, and folders are columns."""
        for number, dtype in enumerate((np.int32, np.int64)):
            (tmp_path / f"data/year={2020 + number}").mkdir(parents=True)
            table = pa.table({"x": np.arange(20, dtype=dtype) + number / 2, "label": np.arange(20, dtype=dtype) % 2})
            pq.write_table(table, tmp_path / f"data/year={2020 + number}/part-0.parquet")
        (tmp_path / "data/_SUCCESS").touch()
        (tmp_path / "data/year=2020/.part-0.parquet.crc").write_bytes(b"crc")
        inputs, targets = together(parquet(tmp_path / "data", inputs=["x", "year"]))
        assert inputs.shape == (40, 2) and set(inputs[:, 1].tolist()) == {2020, 2021} and targets.sum() == 20

    @pytest.mark.parametrize(
        "values",
        [
            pa.array(["a", "b"] * 20, pa.large_string()),
            pa.array(["a", "b"] * 20).dictionary_encode(),
            pa.array(["a", "b"] * 20, pa.string()),
        ],
        ids=["large", "dictionary", "string"],
    )
    def test_texts_of_every_kind_are_labels(self, tmp_path: Path, values: pa.Array) -> None:
        splits = parquet(written(tmp_path, x=POINTS[:, 0], label=values))
        assert splits.label_names == ("a", "b") and np.bincount(together(splits)[1]).tolist() == [20, 20]

    def test_half_precision(self, tmp_path: Path) -> None:
        halves = POINTS[:, 0].astype(np.float16)
        inputs, _ = together(parquet(written(tmp_path, x=halves, label=np.arange(40) % 2)))
        assert np.array_equal(inputs[:, 0], np.sort(halves).astype(np.float32))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (pa.array([1, 2], pa.decimal128(5, 2)), "x: decimal128"),
            (pa.array([1, 2], pa.date32()), "x: date32"),
            (pa.array([1, None], pa.int64()), "x: 1 of 2 examples are missing"),
            (pa.array([1.0, None], pa.float16()), "x: 1 of 2 examples are missing"),
            (pa.array([[1.0], []]), "x: 1 of 2 examples are lists of another length than the first, 1, such as 0"),
        ],
    )
    def test_kinds_that_are_no_numbers(self, tmp_path: Path, values: pa.Array, message: str) -> None:
        assert message in refusal(parquet, written(tmp_path, x=values, label=[0, 1]), inputs="x")

    @pytest.mark.parametrize(
        "name", ["a=b", "a,b", "a#b", "100%", "a b", "größe", "[a]", "{a}", "a'b", 'a"b', "~a", "é"]
    )
    def test_any_name_of_a_file(self, tmp_path: Path, name: str) -> None:
        """Glob and Hive's syntax among them."""
        for path in (tmp_path / f"{name}.parquet", tmp_path / name / "0.parquet"):
            path.parent.mkdir(exist_ok=True)
            written(tmp_path, x=POINTS[:, 0], label=np.arange(40) % 2).rename(path)
            assert len(together(parquet(path, inputs="x"))[0]) == 40
        assert len(together(parquet(tmp_path / name, inputs="x"))[0]) == 40

    def test_all_errors_are_reported_at_once(self, tmp_path: Path) -> None:
        holed = [None if row == 7 else float(row) for row in range(40)]
        lists = [[1, 2]] * 39 + [[1]]
        path = written(tmp_path, a=holed, b=lists, t=[None, "x"] * 20, label=[*range(39), -2])
        message = refusal(parquet, path, inputs=["a", "zz"], client_ids="t", classes=100)
        for error in (
            "zz: there is no such column; valid: a, label, t",
            "t: 20 of 40 examples are null; the first is example 0",
            "a: 1 of 40 examples are missing (NaN)",
            "label: 1 of 40 examples are outside 0..99, such as -2; the first is example 39",
        ):
            assert error in message, message
        assert "b: 1 of 40 examples are lists of another length than the first, 2, such as 1" in refusal(
            parquet, path, inputs="b"
        )

    @pytest.mark.parametrize(
        ("columns", "keys", "message"),
        [
            ({"x": [[1.0, None], [1.0, 2.0]]}, {"inputs": "x"}, "x: 1 of 2 examples are missing (NaN)"),
            ({"x": [None, [1.0]]}, {"inputs": "x"}, "x: 1 of 2 examples are null; the first is example 0"),
            ({"x": ["a", "b"]}, {"inputs": "x"}, "x: <U1 [2]: inputs must be numbers"),
            ({"x": np.zeros(2, "M8[s]")}, {"inputs": "x"}, "x: timestamp[ms]; columns must be numbers"),
            (
                {"x": [[1], [2]], "y": [0, 1]},
                {"inputs": ["x", "y"]},
                "x: int64 [2, 1]: several inputs must be one number per example each",
            ),
            (
                {"x": [b"png", b"x"]},
                {"inputs": "x"},
                "none of 2 images can be read, such as x of example 0: not an image, or damaged",
            ),
            ({"x": [[1, 9], [2, 3]]}, {"inputs": "x", "targets": None, "classes": 9}, "with a token outside 0..8"),
            (
                {"x": [0.5, 1.5]},
                {"inputs": "x", "targets": None},
                "x: float64 [2]: tokens must be a list of integers",
            ),
        ],
    )
    def test_columns_that_cannot_be_used(self, tmp_path: Path, columns: Any, keys: Any, message: str) -> None:
        assert message in refusal(parquet, written(tmp_path, **({"label": [0, 1]} | columns)), **keys)

    @pytest.mark.parametrize(
        "corrupt",
        [
            lambda content: content[:-20],
            lambda content: b"<html>not found",
            lambda content: content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :],
        ],
    )
    def test_damaged_files(self, tmp_path: Path, corrupt: Any) -> None:
        path = written(tmp_path, x=POINTS[:, 0], label=np.arange(40))
        path.write_bytes(corrupt(path.read_bytes()))
        assert "is not a parquet file, or damaged: " in refusal(parquet, path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert "is not a parquet file, or damaged: " in refusal(parquet, tmp_path / "nowhere.parquet")

    def test_the_install_command_of_pyarrow_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert "pip install pyarrow" in refusal(parquet, tmp_path / "a.parquet")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv_module.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"age": number, "height": point[0], "site": "ab"[number % 2], "animal": ["dog", "cat"][number % 2], "w": 1 + number}
    for number, point in enumerate(POINTS.tolist())
]
ROLES = {"inputs": ["age", "height"], "targets": "animal", "client_ids": "site", "weights": "w"}


@pytest.mark.parametrize(("read", "write"), [(csv, write_csv), (jsonl, write_jsonl)], ids=["csv", "jsonl"])
class TestTextTables:
    def test_rows_are_those_of_the_same_parquet_file(self, tmp_path: Path, read: Any, write: Any) -> None:
        splits = read(write(tmp_path / "rows", ROWS), **ROLES)
        columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
        expected = parquet(written(tmp_path, **columns), **ROLES)
        assert splits.label_names == ("cat", "dog") and splits.client_names == ("a", "b")
        assert np.array_equal(splits.weights, expected.weights)
        for source, other in ((splits.train, expected.train), (splits.test, expected.test)):
            assert all(map(torch.equal, all_of(source), all_of(other)))
            assert np.array_equal(source.client_ids, other.client_ids)

    def test_a_column_may_turn_from_integers_to_numbers_late(self, tmp_path: Path, read: Any, write: Any) -> None:
        """The first float is after the first block that the reader parses."""
        rows = [{"x": 1, "note": "n" * 50_000, "label": 0}] * 50 + [{"x": 0.5, "note": "n", "label": 1}]
        splits = read(write(tmp_path / "rows", rows), inputs="x", test_path=write(tmp_path / "test", rows[-1:]))
        assert all_of(splits.train)[0].flatten().tolist() == [1.0] * 50 + [0.5]
        assert all_of(splits.test)[0].tolist() == [[0.5]]

    def test_missing_numbers_and_columns_are_reported(self, tmp_path: Path, read: Any, write: Any) -> None:
        path = write(tmp_path / "rows", [*ROWS[:9], ROWS[9] | {"age": None}])
        message = refusal(read, path, **ROLES | {"weights": "weight"})
        assert "age: 1 of 10 examples are missing (NaN) or not finite" in message
        assert "weight: there is no such column; valid: age, height, site, animal, w" in message

    def test_damaged_files(self, tmp_path: Path, read: Any, write: Any) -> None:
        path = write(tmp_path / "rows", ROWS)
        for content in (b"", path.read_bytes() + b'{"age": 3, "x', None):
            path.unlink() if content is None else path.write_bytes(content)
            assert f"is not a {read.__name__} file, or damaged: " in refusal(read, path, **ROLES)


def test_lists_of_json_lines(tmp_path: Path) -> None:
    rows = [{"point": point, "label": number % 3} for number, point in enumerate(POINTS.tolist())]
    inputs, targets = together(jsonl(write_jsonl(tmp_path / "rows", rows)))
    order = np.argsort(POINTS[:, 0])
    assert np.array_equal(inputs, POINTS[order].astype(np.float32)) and np.array_equal(targets, order % 3)
    tokens = jsonl(write_jsonl(tmp_path / "ids", [{"ids": [1, 2, number]} for number in range(10)]), targets=None)
    assert tokens.classes == 10 and all_of(tokens.train)[0].shape == (9, 2)


def save(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    datasets.Dataset.from_dict(columns, **options).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


class TestSaved:
    def test_a_dataset_is_split_and_knows_its_classes(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {"x": datasets.Array2D((3, 1), "float32"), "label": datasets.ClassLabel(names=["cat", "dog", "fox"])}
        )
        path = save(tmp_path, {"x": POINTS[:, :, None].tolist(), "label": [0, 1] * 20}, features=features)
        splits = saved_dataset(path)
        assert (len(splits.train), len(splits.test), splits.classes) == (36, 4, 3)
        assert splits.label_names == ("cat", "dog", "fox")
        assert np.array_equal(together(splits)[0][:, :, 0], POINTS[np.argsort(POINTS[:, 0])].astype(np.float32))

    def test_a_dict_has_its_test_set_and_images(self, tmp_path: Path) -> None:
        images = GENERATOR.integers(0, 256, (6, 4, 5, 3), np.uint8)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        parts = {
            name: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in some], "label": list(range(len(some)))},
                features=features,
            )
            for name, some in (("train", images), ("validation", images[:2]))
        }
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        splits = saved_dataset(tmp_path / "saved")
        inputs, targets = all_of(splits.test)
        assert len(splits.train) == 6 and targets.tolist() == [0, 1] and not splits.has_validation
        assert np.allclose(inputs.numpy(), images[:2].transpose(0, 3, 1, 2) / 255)
        datasets.DatasetDict({**parts, "test": parts["train"]}).save_to_disk(tmp_path / "three")
        splits = saved_dataset(tmp_path / "three")
        assert [len(source) for source in splits.parts.values()] == [6, 6, 2]

    def test_selected_rows_are_saved_in_their_order(self, tmp_path: Path) -> None:
        data = datasets.Dataset.from_dict({"x": list(map(float, range(20))), "label": [0, 1] * 10})
        data.shuffle(seed=0).select(range(10)).save_to_disk(tmp_path / "saved")
        inputs, targets = together(saved_dataset(tmp_path / "saved"))
        assert len(inputs) == 10 and np.array_equal(inputs[:, 0] % 2, targets)

    @pytest.mark.parametrize(
        ("corrupt", "message"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-8]), "data-00001-of-00002.arrow: cut short"),
            (lambda path: path.write_bytes(path.read_bytes()[:-200]), "data-00001-of-00002.arrow: cut short"),
            (lambda path: path.write_bytes(b"<html>not found"), "data-00001-of-00002.arrow: cut short"),
            (lambda path: path.unlink(), "data-00001-of-00002.arrow: No such file"),
            (lambda path: (path.parent / "state.json").write_text("{"), "state.json of saved/ cannot be read"),
            (lambda path: (path.parent / "state.json").unlink(), "has neither a state.json nor a dataset_dict.json"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, corrupt: Any, message: str) -> None:
        path = save(tmp_path, {"x": POINTS.tolist(), "label": [0] * 40})
        corrupt(path / "data-00001-of-00002.arrow")
        assert message in refusal(saved_dataset, path)

    def test_unknown_labels_are_reported(self, tmp_path: Path) -> None:
        """Test examples with secret labels have -1 in `datasets`."""
        features = datasets.Features({"x": datasets.Value("float32"), "label": datasets.ClassLabel(names=["a", "b"])})
        path = save(tmp_path, {"x": [1.0, 2.0], "label": [1, -1]}, features=features)
        assert "label: 1 of 2 examples are outside 0..1, such as -1" in refusal(saved_dataset, path)

    def test_rows_selected_by_an_index_are_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path, {"x": [1.0, 2.0], "label": [1, 0]})
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
        assert "its rows are selected by an index" in refusal(saved_dataset, path)
