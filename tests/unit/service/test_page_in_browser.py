"""The page in a real browser: the example, a drawing, a row of a table, and the figures of now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support import browser
from tests.support.browser import Browser, new_browser
from tests.support.exported import write_linear, write_version
from tests.support.serving import serving
from trainer.service.server import Server
from trainer.service.version import CARD, COLUMNS, DESCRIPTION, TensorSpec, checksums, read_version

SIDE, NAMES = 4, ["left", "right"]
ONNX_TYPES = {"FP32": TensorProto.FLOAT, "INT64": TensorProto.INT64}
COLUMNS_OF_TABLE = {
    "numbers": {"age": {"fill": 30.0, "mean": 40.0, "std": 10.0}, "height": {"fill": 1.7, "mean": 1.7, "std": 0.1}},
    "categories": {"city": {"categories": ["Bonn", "Ulm"], "fill": "Ulm"}},
}

# The rows of the first table of scores, and the controls that a screen reader has no name for.
SCORES = """
return [...document.querySelectorAll("#answer tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
"""
UNNAMED = """
const controls = [...document.querySelectorAll("button, input, select, textarea, canvas, meter")];
const isNamed = (control) => control.ariaLabel || control.labels?.length || control.textContent.trim();
return controls.filter((control) => !isNamed(control)).map((control) => control.outerHTML);
"""
KEYS = """
for (const key of arguments[0]) {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true });
  document.getElementById("canvas").dispatchEvent(event);
}
return JSON.parse(document.getElementById("request").value).inputs[0];
"""


def picture_weights() -> np.ndarray:
    """Return weights by which a picture is `left` or `right`."""
    columns = np.tile(np.arange(SIDE), SIDE)
    return np.stack([columns < SIDE / 2, columns >= SIDE / 2], axis=1).astype(np.float32)


def softmax(outputs: np.ndarray) -> np.ndarray:
    powers = np.exp(outputs)
    return powers / powers.sum(axis=1, keepdims=True)


def describe(folder: Path, **changes: object) -> None:
    """Write the description of a version again, with its files as they are."""
    described = replace(read_version(folder), **changes, sha256=checksums(folder))
    (folder / DESCRIPTION).write_text(described.to_json())


def write_models(root: Path) -> None:
    """Write a model of pictures with a card, and one of the rows of a table."""
    outputs = {"outputs": [-1, 2], "scores": [-1, 2], "label": [-1]}
    types = {"outputs": "FP32", "scores": "FP32", "label": "INT64"}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["inputs"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["outputs"]),
            helper.make_node("Softmax", ["outputs"], ["scores"]),
            helper.make_node("ArgMax", ["outputs"], ["label"], axis=1, keepdims=0),
        ],
        "pictures",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])],
        [
            helper.make_tensor_value_info(name, ONNX_TYPES[types[name]], ["batch", *shape[1:]])
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(picture_weights(), "weight")],
    )
    example = np.arange(2 * SIDE**2, dtype=np.float32).reshape(2, 1, SIDE, SIDE) / 32
    logits = example.reshape(2, -1) @ picture_weights()
    answer = {"outputs": logits, "scores": softmax(logits), "label": logits.argmax(1)}
    inputs = [TensorSpec("inputs", "FP32", [-1, 1, SIDE, SIDE])]
    specs = [TensorSpec(name, types[name], shape) for name, shape in outputs.items()]  # pyright: ignore[reportArgumentType]
    pictures = write_version(root / "pictures", 1, graph, inputs, specs, {"inputs": example}, answer, {})
    (pictures / CARD).write_text("# A card\n\n<img src=x onerror=alert(1)>\n")
    describe(pictures, label_names=NAMES)
    table = write_linear(root / "table", 1)
    (table / COLUMNS).write_text(json.dumps(COLUMNS_OF_TABLE))
    describe(table)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := browser.why_not():
        pytest.skip(reason)
    with new_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def send(window: Browser) -> list[list[str]]:
    """Send the request of the form, and return the table of the answer."""
    window.run("document.getElementById('answer').replaceChildren(); document.querySelector('[type=submit]').click()")
    window.wait_for("return document.getElementById('answer').children.length")
    return window.run(SCORES)


def test_a_model_of_pictures(server: Server, window: Browser) -> None:
    window.open(f"{server.http_url}/")
    assert window.run("return document.title") == "pictures"
    assert "onerror" in window.run("return document.querySelector('article').textContent")
    assert window.run("return [...document.querySelectorAll('nav a')].map((link) => link.textContent)") == [
        "pictures",
        "table",
    ]
    # The example has two rows: each has a table.
    assert len(send(window)) == 4
    # A pixel at the right, by the keyboard.
    drawn = window.run(KEYS, ["ArrowRight", " "])
    expected = np.zeros((1, 1, SIDE, SIDE), np.float32)
    expected[0, 0, SIDE // 2, SIDE // 2 + 1] = 1
    assert drawn == {
        "name": "inputs",
        "datatype": "FP32",
        "shape": [1, 1, SIDE, SIDE],
        "data": expected.ravel().tolist(),
    }
    scores = softmax(expected.reshape(1, -1) @ picture_weights())[0]
    assert send(window) == [["right", f"{scores[1]:.4f}", ""], ["left", f"{scores[0]:.4f}", ""]]
    assert window.wait_for("const rate = document.getElementById('rate').textContent; return rate === '–' ? '' : rate")
    assert (window.run(UNNAMED), window.errors()) == ([], [])


def test_a_refused_request_says_why(server: Server, window: Browser) -> None:
    window.open(f"{server.http_url}/?model=pictures")
    window.run("document.getElementById('request').value = '{}'")
    send(window)
    assert "inputs: got []" in window.run("return document.querySelector('#answer .bad').textContent")
    window.errors()  # the browser reports the status 400


def test_a_model_of_a_table(server: Server, window: Browser) -> None:
    window.open(f"{server.http_url}/?model=table")
    row = window.run(
        "const [age, height, city] = document.querySelectorAll('#fields input, #fields select');"
        "age.value = '50'; city.value = 'Bonn'; city.dispatchEvent(new Event('input', { bubbles: true }));"
        "return JSON.parse(document.getElementById('request').value).inputs[0].data"
    )
    np.testing.assert_allclose(row, [1, 0, 1, 0])
    send(window)
    assert window.run("return document.getElementById('answer').textContent").endswith("2")
    assert (window.run(UNNAMED), window.errors()) == ([], [])
