"""Engines compute what the graph says, and refuse what they cannot load, with a sentence."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from tests.support.exported import weights, write_linear
from trainer.service.engine import load_engine
from trainer.service.version import DESCRIPTION, EXPORTED_PROGRAM, ONNX, checksums, read_version


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


class Affine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.linear(inputs) + torch.tensor([1.0, 2.0, 3.0])
        return {"outputs": outputs, "label": outputs.argmax(1)}


@pytest.fixture
def program(tmp_path) -> tuple[Path, Affine]:
    """Write a version that has no ONNX; return its folder and the module."""
    folder, module = write_linear(tmp_path / "linear", 1), Affine().eval()
    graph = torch.export.export(module, (torch.ones(3, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(graph, folder / EXPORTED_PROGRAM)
    (folder / ONNX).unlink()
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({**description, "sha256": checksums(folder)}))
    return folder, module


def test_an_exported_program_is_bit_equal_to_its_module(program):
    folder, module = program
    engine = load_engine(folder, read_version(folder), threads=1)
    for rows in (1, 2, 64):
        inputs = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
        with torch.no_grad():
            expected = module(torch.from_numpy(inputs))
        outputs = engine.run({"inputs": inputs})
        assert list(outputs) == ["outputs", "label"]
        for name, tensor in expected.items():
            np.testing.assert_array_equal(outputs[name], tensor.numpy())


def test_an_exported_program_needs_pytorch(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"has no model\.onnx, and PyTorch, which model\.pt2 needs, is not installed"):
        load_engine(program[0], read_version(program[0]))


@pytest.mark.parametrize(
    ("member", "old", "new", "reason"),
    [
        ("data/aotinductor/model/library.so", "", "", "it contains data/aotinductor/model/library.so"),
        ("data/weights/model_weights_config.json", '"use_pickle": false', '"use_pickle": true', "that are pickled"),
        ("models/model.json", "torch.ops.aten.linear.default", "torch.hub.load", "it calls torch.hub.load"),
        ("models/model.json", "Symbol('s", "sympify('s", "it has a size of sympify"),
        ("data/sample_inputs/model.pt", "", "", "cannot be loaded"),
    ],
)  # fmt: skip
def test_an_archive_that_wants_to_run_something_is_not_loaded(program, member, old, new, reason):
    path, description = program[0] / EXPORTED_PROGRAM, read_version(program[0])
    with ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = f"{next(iter(files)).partition('/')[0]}/{member}"
    files[name] = files[name].replace(old.encode(), new.encode()) if old else pickle.dumps(sys.exit)
    with ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    with pytest.raises(ValueError, match=reason):
        load_engine(program[0], description)
