"""Files of any format become the inputs that training would have made of them, and a row of predictions each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from tests.support.exported import weights, write_linear
from tests.support.tokenizers import save_tokenizer
from trainer.commands.exported_version import Version
from trainer.commands.predict.inputs import read_file
from trainer.commands.predict.main import main
from trainer.data.sources.table import CategoryEncoding, NumberEncoding, TableEncoder
from trainer.data.tokenization.tokenizer import load_tokenizer
from trainer.service.version import DESCRIPTION, ModelDescription, TensorSpec, checksums, read_version

NAMES = ("cat", "dog", "=1+1")
ROWS = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32).round(4)
TABLE = {"_target_": "trainer.data.csv", "targets": "kind", "inputs": None, "columns": {}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a linear model of four inputs and three named classes, whose newest version is the second."""
    for number in (1, 2):
        describe(write_linear(tmp_path / "models/linear", number), TABLE)
    return tmp_path / "models/linear"


def describe(version: Path, data: dict[str, Any], encoder: TableEncoder | None = None) -> None:
    """Give a version the configuration of its data, and the names of its classes."""
    description = replace(read_version(version), label_names=list(NAMES))
    (version / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    if encoder:
        (version / "columns.json").write_text(encoder.to_json())
    (version / DESCRIPTION).write_text(replace(description, sha256=checksums(version)).to_json())


def write_csv(path: Path, rows: np.ndarray) -> None:
    path.write_text("a,b,c,d,kind\n" + "".join(",".join([*map(str, row), "cat"]) + "\n" for row in rows))


def write_jsonl(path: Path, rows: np.ndarray) -> None:
    path.write_text("".join(json.dumps(dict(zip("abcd", row, strict=True))) + "\n" for row in rows.tolist()))


def write_parquet(path: Path, rows: np.ndarray) -> None:
    pyarrow.parquet.write_table(pyarrow.table(dict(zip("abcd", rows.T, strict=True))), path)


def write_npz(path: Path, rows: np.ndarray) -> None:
    np.savez(path, x=rows, unused=np.zeros(3))


def predicted(*arguments: str | Path) -> dict[str, np.ndarray]:
    """Return the columns that the command writes."""
    out = Path(arguments[0]).parent / "predictions.npz"
    main([*map(str, arguments), "--out", str(out), "--overwrite"])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet, write_npz])
def test_each_row_of_a_file_is_predicted(
    model: Path, tmp_path: Path, write: Callable[[Path, np.ndarray], None]
) -> None:
    """By the newest version, in batches, with or without the column of targets."""
    path = tmp_path / f"rows.{write.__name__.removeprefix('write_')}"
    write(path, ROWS)
    found = predicted(model, path, "--batch-size", "64")
    expected = ROWS @ weights(2)
    np.testing.assert_allclose(found["outputs"], expected, rtol=1e-5)
    assert found["label"].tolist() == expected.argmax(1).tolist()
    assert found["label_name"].tolist() == [NAMES[label] for label in expected.argmax(1)]
    assert found["row"].tolist() == list(range(150)) and set(found["file"]) == {str(path)}


def test_the_formats_of_predictions_hold_the_same(model: Path, tmp_path: Path) -> None:
    """One row after the other of several files, with every digit; no cell is a formula."""
    for name, rows in (("one", ROWS[:3]), ("two", ROWS[3:5])):
        write_csv(tmp_path / f"{name}.csv", rows)
    files = [str(tmp_path / "one.csv"), str(tmp_path / "two.csv")]
    arrays = predicted(model, *files)
    assert arrays["row"].tolist() == [0, 1, 2, 0, 1]
    main([str(model / "2"), *files, "--out", str(tmp_path / "p.csv")])
    main([str(model / "2"), *files, "--out", str(tmp_path / "p.parquet")])
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert {name: values.tolist() for name, values in arrays.items()} == table
    with open(tmp_path / "p.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [int(row["label"]) for row in read] == arrays["label"].tolist()
    for index, name in enumerate(("outputs_cat", "outputs_dog", "outputs_=1+1")):
        assert np.array([row[name] for row in read], np.float32).tolist() == arrays["outputs"][:, index].tolist()
    assert {row["label_name"] for row in read} <= {"cat", "dog", "'=1+1"}


def test_columns_are_encoded_as_in_training(model: Path, tmp_path: Path) -> None:
    """Unseen categories are zeros, and gaps are filled; the order of the columns is that of the encoder."""
    encoder = TableEncoder({"x": NumberEncoding(2.0, 1.0, 4.0)}, {"city": CategoryEncoding(("B", "K", "R"), "K")})
    describe(model / "2", {**TABLE, "columns": {"number": ["x"], "category": ["city"]}}, encoder)
    rows = [("R", 5.0), ("Z", -3.0), (None, None), ("B", 1.0)]
    (tmp_path / "rows.csv").write_text(
        "city,x\n" + "".join(f"{city or ''},{'' if x is None else x}\n" for city, x in rows)
    )
    city, x = zip(*rows, strict=True)
    found = predicted(model, tmp_path / "rows.csv")
    np.testing.assert_allclose(found["outputs"], encoder({"x": x, "city": city}).numpy() @ weights(2), rtol=1e-6)


def test_other_keys_of_data_choose_the_inputs(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", mine=ROWS[:2])
    found = predicted(model, tmp_path / "rows.npz", "data.inputs=mine")
    np.testing.assert_allclose(found["outputs"], ROWS[:2] @ weights(2), rtol=1e-5)


def test_without_a_file_the_first_rows_are_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "rows.csv", ROWS)
    main([str(model), str(tmp_path / "rows.csv")])
    shown = capsys.readouterr().out
    assert "label_name" in shown and "... and 140 more" in shown


def refused(arguments: Sequence[str | Path]) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        main(list(map(str, arguments)))
    return str(error.value)


def test_what_cannot_be_predicted_is_refused(model: Path, tmp_path: Path) -> None:
    """All files are named at once, with what the model wants; nothing is written, and nothing is replaced unasked."""
    np.savez(tmp_path / "wide.npz", x=ROWS[:, :3])
    np.savez(tmp_path / "whole.npz", x=np.arange(8).reshape(2, 4))
    np.savez(tmp_path / "named.npz", y=ROWS)
    Image.new("L", (5, 4)).save(tmp_path / "grey.png")
    (tmp_path / "rows.doc").write_text("")
    names = ("wide.npz", "whole.npz", "named.npz", "grey.png", "rows.doc", "none.csv")
    message = refused([model, *(tmp_path / name for name in names), "--out", tmp_path / "p.csv"])
    for wanted in (
        "shape of inputs: got [1, 3], wanted [-1, 4]",
        "datatype of inputs: got 'INT64', wanted FP32",
        "x: there is no such array",
        "shape of inputs: got [1, 3, 4, 5]",
        "rows.doc: it is of no known format",
        "none.csv: there is no such file",
    ):
        assert wanted in message
    assert not (tmp_path / "p.csv").exists()
    write_csv(tmp_path / "rows.csv", ROWS[:2])
    (tmp_path / "p.csv").write_text("mine")
    assert "exists" in refused([model, tmp_path / "rows.csv", "--out", tmp_path / "p.csv"])
    assert (tmp_path / "p.csv").read_text() == "mine"
    assert "valid: a file named *.csv" in refused([model, tmp_path / "rows.csv", "--out", tmp_path / "p.txt"])
    assert "is no exported model" in refused([tmp_path, tmp_path / "rows.csv"])
    (model / "2/model.onnx").write_bytes(b"damaged")
    assert "its checksum differs" in refused([model, tmp_path / "rows.csv"])


def test_the_images_of_a_folder_are_examples(tmp_path: Path) -> None:
    """They are read as in training: grey, scaled to its size, in the order of their names."""
    folder = tmp_path / "images/sub"
    folder.mkdir(parents=True)
    for name, grey in (("b.png", 51), ("a.png", 255)):
        Image.new("L", (6, 6), grey).save(folder / name)
    description = ModelDescription([TensorSpec("inputs", "FP32", [-1, 1, 3, 3])], [], "task", "", {})
    version = Version(tmp_path, description, {"_target_": "trainer.data.image_folder", "size": 3}, None)
    found = read_file(tmp_path / "images", version, {})
    (inputs,) = found.batches(8)
    assert [Path(name).name for name in found.names] == ["a.png", "b.png"]
    np.testing.assert_allclose(inputs["inputs"], np.full((2, 1, 3, 3), [[[[1.0]]], [[[0.2]]]]), rtol=1e-6)


def test_the_lines_of_a_text_are_examples(tmp_path: Path) -> None:
    """They become tokens by the tokenizer of the data, padded to the longest of a batch."""
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "lines.txt").write_text("the quick brown fox\nthe dog\nwhy\n")
    tokens = [TensorSpec(name, "INT64", [-1, -1]) for name in ("input_ids", "attention_mask")]
    description = ModelDescription(tokens, [], "task", "", {})
    version = Version(tmp_path, description, {"tokenizer": str(tmp_path / "tokenizer"), "text_length": 8}, None)
    found = read_file(tmp_path / "lines.txt", version, {})
    (inputs,) = found.batches(3)
    lengths = inputs["attention_mask"].sum(1)
    assert list(found.rows) == [0, 1, 2] and lengths[0] == inputs["input_ids"].shape[1] > lengths[1]
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer.backend.decode(inputs["input_ids"][1][: lengths[1]]).strip() == "the dog"
    with pytest.raises(ValueError, match=r"needs a tokenizer"):
        read_file(tmp_path / "lines.txt", replace(version, data={}), {})
