"""Engines compute what the graph says, and refuse what they cannot load, with a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.exported import weights, write_linear
from trainer.service.engine import load_engine
from trainer.service.version import ONNX, read_version


def test_onnx_runtime_computes_the_graph(tmp_path):
    folder = write_linear(tmp_path / "linear", 3)
    engine = load_engine(folder, read_version(folder), threads=1)
    inputs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    outputs = engine.run({"inputs": inputs})
    assert list(outputs) == ["outputs", "label"]
    np.testing.assert_allclose(outputs["outputs"], inputs @ weights(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["label"], outputs["outputs"].argmax(1))


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    folder = write_linear(tmp_path / "linear", 1)
    description = read_version(folder)
    (folder / ONNX).write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"model\.onnx cannot be loaded"):
        load_engine(folder, description)
