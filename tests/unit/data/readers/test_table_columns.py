"""Columns of tables by kind are encoded as scikit-learn does, and text files of tables are read rightly or refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.support.silo_tables import inputs_of, read_silos
from trainer.data import DataSplits, TableEncoder, csv, jsonl, parquet
from trainer.data.readers.limits import check_room
from trainer.data.sources.table import TableSource
from trainer.data.transforms.normalization import Standardise

COLUMNS = {"number": ["age", "time", "same"], "category": ["city", "sex"]}
HEADER = "age,time,same,city,sex,label\n"
SMALL = HEADER + "1,2,3,Rome,f,0\n2,,3,,m,1\n,4,3,Bonn,m,0\n"


def frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """Return a table with missing values, large means, a constant column, and categories in several spellings."""
    generator = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "age": generator.integers(20, 80, rows).astype(float),
            "time": 1.7e9 + generator.normal(size=rows),
            "same": 3.0,
            "city": generator.choice(["Bonn", "Köln", "Rome", "01", "x, y"], rows, p=[0.3, 0.3, 0.2, 0.1, 0.1]),
            "sex": generator.choice(["f", "m"], rows),
            "label": generator.integers(0, 2, rows),
        }
    )
    for name in ("age", "time", "city"):
        table.loc[generator.random(rows) < 0.2, name] = None
    return table


def write(path: Path, table: pd.DataFrame) -> Path:
    """Write a table in the format that the name says."""
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False, row_group_size=7)
    elif ".jsonl" in path.name:
        rows = [
            {name: None if pd.isna(value) else value for name, value in row.items()} for row in table.to_dict("records")
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_csv(path, index=False)
    return path


def reference(train: pd.DataFrame, *others: pd.DataFrame, **options: Any) -> list[np.ndarray]:
    """Return the matrices of scikit-learn, fitted to the first table."""
    numbers = (
        SimpleImputer(strategy="constant", fill_value=options["number"]) if "number" in options else SimpleImputer()
    )
    fill = (
        {"strategy": "constant", "fill_value": options["category"]}
        if "category" in options
        else {"strategy": "most_frequent"}
    )
    pipeline = ColumnTransformer(
        [
            ("number", make_pipeline(numbers, StandardScaler()), COLUMNS["number"]),
            (
                "category",
                make_pipeline(
                    SimpleImputer(missing_values=None, **fill),
                    OneHotEncoder(handle_unknown="ignore", sparse_output=False),
                ),
                COLUMNS["category"],
            ),
        ]
    )
    tables = [table.astype({name: object for name in COLUMNS["category"]}) for table in (train, *others)]
    tables = [table.where(table.notna(), None).astype({name: float for name in COLUMNS["number"]}) for table in tables]
    return [pipeline.fit_transform(tables[0]), *(pipeline.transform(table) for table in tables[1:])]


def refusal(read: Any, path: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        read(path, **keys)
    return str(error.value)


@pytest.mark.parametrize("read", [csv, jsonl, parquet])
@pytest.mark.parametrize("impute", [{}, {"number": 7.5, "category": "Köln"}, {"category": "none"}], ids=str)
def test_encoding_is_that_of_scikit_learn(tmp_path: Path, read: Any, impute: Any) -> None:
    """The statistics are of the training file alone; a category that only the test file has is a row of zeros."""
    train, test = frame(60), frame(30, seed=1)
    test.loc[3, "city"] = "Oslo"
    name = read.__name__
    paths = [write(tmp_path / f"{part}.{name}", table) for part, table in (("train", train), ("test", test))]
    splits = read(paths[0], columns=COLUMNS, impute=impute, test_path=paths[1], validation_path=paths[1])
    for source, expected in zip(splits.parts.values(), reference(train, test, test, **impute), strict=True):
        found = inputs_of(source)
        assert found.dtype == np.float32 and np.allclose(found, expected, atol=2e-6)
    assert splits.train.column_names[:3] == ("age", "time", "same") and splits.train.column_names.count("sex") == 2
    encoder = splits.encoder
    assert encoder is not None and encoder.numbers["same"].std == 1.0
    assert encoder.numbers["time"].std == pytest.approx(
        np.std(inputs_of(splits.train)[:, 1]) * encoder.numbers["time"].std
    )


def test_statistics_of_silos_are_those_of_the_pooled_table(ranks: Any, tmp_path: Path) -> None:
    """No silo has all categories, one has no value of a column, and two ranks share a silo."""
    tables = [frame(40), frame(50, seed=1), frame(20, seed=2)]
    tables[0]["age"] = None
    tables[0] = tables[0][tables[0].city != "Rome"]
    tables[1] = tables[1][tables[1].city != "Bonn"]
    paths = [str(write(tmp_path / f"{number}.parquet", table)) for number, table in enumerate(tables)]
    pooled = pd.concat(tables, ignore_index=True).astype({"age": float})
    whole = write(tmp_path / "whole.parquet", pooled)
    expected = parquet(whole, columns=COLUMNS, test_path=whole).encoder
    (matrix,) = reference(pooled)
    parts = np.split(matrix, np.cumsum([len(table) for table in tables])[:-1])
    assert expected is not None
    for silos in (2, [1, 3], 1):
        for encoder, local in ranks(4 if silos == [1, 3] else 2).run(read_silos, paths, str(whole), silos, COLUMNS):
            assert encoder.categories == expected.categories
            for name, one in encoder.numbers.items():
                other = expected.numbers[name]
                assert (one.fill, one.mean) == pytest.approx((other.fill, other.mean), rel=1e-12)
                # A mean of 1.7e9 has steps of 2.4e-7 in float64.
                assert one.std == pytest.approx(other.std, rel=1e-7 if name == "time" else 1e-12)
            assert all(np.allclose(local[client], parts[client], atol=2e-6) for client in local)


def test_a_saved_encoder_encodes_other_rows_alike(tmp_path: Path) -> None:
    train, test = frame(60), frame(30, seed=1)
    paths = [write(tmp_path / f"{part}.parquet", table) for part, table in (("train", train), ("test", test))]
    splits = parquet(paths[0], columns=COLUMNS, test_path=paths[1])
    assert splits.encoder is not None
    (tmp_path / "columns.json").write_text(splits.encoder.to_json(), encoding="utf-8")
    encoder = TableEncoder.load(tmp_path / "columns.json")
    assert encoder == splits.encoder
    columns = {name: [None if pd.isna(value) else value for value in test[name]] for name in test}
    assert np.allclose(encoder(columns).numpy(), inputs_of(splits.test), atol=1e-5)


def test_standardising_is_that_of_the_transform(tmp_path: Path) -> None:
    """Without it, numbers are as they were."""
    table = frame(50)
    path = write(tmp_path / "rows.parquet", table)
    plain = parquet(path, columns={"number": ["age", "time"]}, standardise=False, test_path=path)
    transform = Standardise()
    inputs = torch.from_numpy(inputs_of(plain.train)).double()
    transform.fit([inputs], lambda sums: sums)
    scaled = parquet(path, columns={"number": ["age"]}, test_path=path)
    assert scaled.encoder is not None
    assert inputs[:, 0].tolist() == pytest.approx(table.age.fillna(table.age.mean()).tolist(), rel=1e-6)
    ours = scaled.encoder.numbers["age"]
    assert (ours.mean, ours.std) == pytest.approx((transform.mean[0].item(), transform.std[0].item()), rel=1e-6)


def test_a_source_of_rows_can_be_moved_and_takes_eight_bytes_a_cell_of_any_width(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": [f"c{row % 500}" for row in range(1000)], "label": 0})
    splits = parquet(write(tmp_path / "rows.parquet", table), columns={"category": ["id"]}, classes=2)
    source = splits.train
    assert isinstance(source, TableSource) and source.nbytes <= 12 * len(source)
    moved = source.to(torch.device("cpu"))
    assert np.array_equal(inputs_of(moved), inputs_of(source)) and inputs_of(source).sum() == len(source)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("read", [csv, jsonl])
def test_encodings_and_compression(tmp_path: Path, read: Any, encoding: str, compressed: bool) -> None:
    """Names are compared in the composed form of Unicode, and gzip is known by its content."""
    rows = [("Größe", "Ort", "label"), *((str(number), "aé"[number % 2], str(number % 2)) for number in range(20))]
    if read is csv:
        text = "".join(",".join(row) + "\r\n" for row in rows)
    else:
        text = "".join(
            json.dumps({"Größe": int(a), "Ort": b, "label": int(c)}, ensure_ascii=False) + "\n" for a, b, c in rows[1:]
        )
    content = text.encode(encoding)
    (tmp_path / "rows").write_bytes(gzip.compress(content) if compressed else content)
    splits = read(tmp_path / "rows", columns={"number": ["Gro\u0308ße"], "category": ["Ort"]}, standardise=False)
    assert splits.train.column_names == ("Größe", "Ort", "Ort") and splits.classes == 2
    together = np.concatenate([inputs_of(splits.train), inputs_of(splits.test)])
    assert sorted(together[:, 0].tolist()) == list(range(20))


def test_many_files_by_a_pattern_or_in_a_folder(tmp_path: Path) -> None:
    """Spark's marks and checksums are left out; files are read in the order of their names."""
    for number in range(3):
        path = tmp_path / f"out/part-{number}.csv.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(f"x,city,label\n{number},c{number},0\n{number}.5,c{number},1\n".encode()))
    (tmp_path / "out/_SUCCESS").touch()
    (tmp_path / "out/.part-0.csv.gz.crc").write_bytes(b"crc")
    for name in ("out", "out/part-*.csv.gz", "out/*"):
        splits = csv(
            tmp_path / name,
            columns={"number": ["x"], "category": ["city"]},
            standardise=False,
            test_path=tmp_path / "out/part-0.csv.gz",
        )
        assert inputs_of(splits.train)[:, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert "there are no files in" in refusal(csv, tmp_path / "none-*.csv")
    (tmp_path / "out/part-3.csv").write_text("y,label\n1,0\n")
    assert "part-0.csv.gz and part-3.csv do not have the same columns: city, x, y" in refusal(csv, tmp_path / "out")


def test_a_hive_partition_is_a_category(tmp_path: Path) -> None:
    for year in (2020, 2021):
        (tmp_path / f"data/year={year}").mkdir(parents=True)
        pq.write_table(pa.table({"x": [0.5] * 10, "label": [0, 1] * 5}), tmp_path / f"data/year={year}/0.parquet")
    (tmp_path / "data/_SUCCESS").touch()
    splits = parquet(tmp_path / "data", columns={"number": ["x"], "category": ["year"]})
    assert splits.encoder is not None and splits.encoder.categories["year"].categories == ("2020", "2021")


def test_images_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the file. Rows may share an image."""
    monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    (tmp_path / "scans").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"scans/{number}.png")
    lines = [f"scans/{number % 4}.png,{number % 2},{number}" for number in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["scan,label,age", *lines]))
    splits = csv(tmp_path / "rows.csv", columns={"image": "scan"}, test_path=tmp_path / "rows.csv")
    assert np.allclose(inputs_of(splits.train), pixels[[0, 1, 2, 3] * 2].transpose(0, 3, 1, 2) / 255)
    assert inputs_of(csv(tmp_path / "rows.csv", columns={"image": "scan"}, size=3, channels=1).train).shape[1:] == (
        1,
        3,
        3,
    )
    (tmp_path / "rows.csv").write_text("scan,label\nscans/0.png,0\nscans/9.png,1\n")
    assert "1 of 2 images are not there, such as scan of example 1, " in refusal(
        csv, tmp_path / "rows.csv", columns={"image": "scan"}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SMALL.replace("age,time,same", "time,age,same") + "5,x7,3,Rome,f,1\n", "age: line 5 has 'x7'"),
        (SMALL + "5,x7,3,Rome,f,1\n", "time: line 5 has 'x7', which is no number"),
        (SMALL + '5,6,3,"Ro\nme",f,1\n5,x7,3,Rome,f,1\n', "time: line 7 has 'x7', which is no number"),
        (SMALL.replace("label", "age"), "several columns are called age"),
        (SMALL.encode().replace(b"Bonn", b"K\xf6ln"), "not UTF-8. Convert it"),
        (SMALL.encode("utf-16-le"), "it has zero bytes, as UTF-16 has without a byte-order mark"),
        (SMALL.replace("city", "town"), "city: there is no such column; valid: age, time, same, town, sex, label"),
        (SMALL.replace("4,3", "inf,3"), "time: 2 of 6 examples are not finite; the first is example 2"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refusal(csv, path, columns=COLUMNS, test_path=path)


def test_a_column_without_values_is_named_by_the_encoder(tmp_path: Path) -> None:
    """Not by the reader of a file: other silos may have some."""
    (tmp_path / "rows.csv").write_text(HEADER + "1,,3,,f,0\n2,,3,,m,1\n3,,3,,m,0\n")
    encoder = csv(tmp_path / "rows.csv", columns=COLUMNS, test_path=tmp_path / "rows.csv").encoder
    assert encoder is not None and [error.split(":")[1] for error in encoder.errors] == [" time", " city"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": COLUMNS, "impute": {"number": None}}, "age: 1 of 3 examples are missing; the first is example 2"),
        (
            {"columns": COLUMNS, "impute": {"category": None}},
            "city: 1 of 3 examples are missing; the first is example 1",
        ),
        ({"columns": COLUMNS, "impute": {"number": "median"}}, "data.impute.number=median\n  valid: mean, a number"),
        ({"columns": {"numbers": ["age"]}}, "data.columns.numbers: no kind of column"),
        ({"columns": {"number": "age"}}, "data.columns.number=age\n  valid: a list of names"),
        ({"columns": {"number": ["age"], "category": ["age"]}}, "data.columns: age is named twice"),
        ({"columns": {"number": ["age"], "image": "city"}}, "data.columns.image=city with age"),
        ({"columns": COLUMNS, "inputs": ["age"]}, "data.inputs=['age'] with data.columns"),
        ({"inputs": ["age", "city"]}, "name each column by its kind in data.columns"),
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, keys: Any, message: str) -> None:
    (tmp_path / "rows.csv").write_text(SMALL)
    assert message in refusal(csv, tmp_path / "rows.csv", test_path=tmp_path / "rows.csv", **keys)


def test_mixed_kinds_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,y,label\n1,2,0\n\n3,none,1\n5,6,0\n")
    assert "y: line 4 has 'none', which is no number" in refusal(csv, tmp_path / "rows.csv")
    rows = [{"x": 1, "label": 0}, {"x": None, "label": 1}, {"x": "two", "label": 0}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "x: line 3 has 'two', unlike the lines before" in refusal(jsonl, path)
    path.write_text('{"x": "1", "label": 0}\n{"x": "2", "label": 1}\n')
    assert "x: line 1 has '1', which is no number" in refusal(jsonl, path, columns={"number": ["x"]})
    for name, value in (("a", "1"), ("b", "one")):
        (tmp_path / f"{name}.csv").write_text(f"x,label\n{value},0\n{value},1\n")
    assert "x: int64 in a.csv, and string in b.csv" in refusal(csv, tmp_path / "[ab].csv")


def test_categories_have_one_name_in_every_file(tmp_path: Path) -> None:
    """1 and 1.0, composed and decomposed letters, integers and texts are the same."""
    table = pa.table(
        {
            "a": [1.0, None, 2.0, 1.0],
            "b": ["é", "e\u0301", "é", None],
            "c": [True, False, True, True],
            "label": [0, 1, 0, 1],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("a,b,c,label\n1,é,true,0\n,e\u0301,false,1\n2.0,é,true,0\n1,,true,1\n")
    for read, name in ((parquet, "rows.parquet"), (csv, "rows.csv")):
        splits = read(tmp_path / name, columns={"category": ["a", "b", "c"]}, test_path=tmp_path / name)
        assert splits.encoder is not None
        assert [each.categories for each in splits.encoder.categories.values()] == [("1", "2"), ("é",), _truths(splits)]


def _truths(splits: DataSplits) -> tuple[str, ...]:
    assert splits.encoder is not None
    return tuple(sorted(splits.encoder.categories["c"].categories))


def test_a_column_of_names_is_no_category(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": [f"c{row}" for row in range(10_001)], "label": 0})
    path = write(tmp_path / "rows.parquet", table)
    assert "id: 10001 categories, and 10000 are allowed" in refusal(parquet, path, columns={"category": ["id"]})


@pytest.mark.parametrize("width", [0, 16])
def test_a_small_parquet_file_of_many_values_is_refused(tmp_path: Path, width: int) -> None:
    """Runs of equal numbers take a few bytes, also in lists."""
    path = tmp_path / "rows.parquet"
    values = pa.array(np.zeros(1 << 18))
    rows = pa.FixedSizeListArray.from_arrays(values, width) if width else values
    pq.write_table(pa.table({"x": rows, "label": np.zeros(len(rows), np.int64)}), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: Memory(total=1 << 20, available=1 << 20))
        assert "unpacked, and this machine has" in refusal(parquet, path)
    assert path.stat().st_size < 1 << 20


class Memory:
    def __init__(self, total: int, available: int):
        self.total, self.available = total, available


def test_a_small_text_file_of_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops when the memory is nearly full."""
    path = tmp_path / "rows.csv"
    path.write_bytes(gzip.compress(b"x,label\n" + b"1,0\n" * (1 << 20)))
    monkeypatch.setattr("trainer.data.readers.table_files.CHECKED_BYTES", 1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(total=100, available=4))
    assert "rows.csv: unpacked it does not fit into the memory" in refusal(csv, path)
    with pytest.raises(ValueError, match="it: unpacked it does not fit"):
        check_room("it")
