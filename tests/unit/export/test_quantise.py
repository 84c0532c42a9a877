"""Quantising: the arithmetic by numpy, what stays in floating point, what it costs, and when it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from trainer.export.quantise import BATCH_SIZE, Measurement, Quantisation, quantise, write_quantised
from trainer.tasks import Classification

RNG = np.random.default_rng(0)
MEAN, STD = np.float32(3.0), np.float32(2.0)
HIDDEN = RNG.normal(size=(6, 4)).astype(np.float32)
BIAS = RNG.normal(size=6).astype(np.float32)
LAST = RNG.normal(size=(3, 6)).astype(np.float32)
ZEROS = np.zeros(3, np.float32)
INPUTS = (RNG.normal(size=(200, 4)) * 2 + 3).astype(np.float32)


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: dict[str, int]) -> Path:
    """Write a graph of these nodes over `inputs` [batch, 4]."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def save_network(path: Path) -> Path:
    """Write standardisation, two linear layers, and the probabilities of classes."""
    nodes = [
        helper.make_node("Sub", ["inputs", "mean"], ["centred"], "centre"),
        helper.make_node("Div", ["centred", "std"], ["standard"], "scale"),
        helper.make_node("Gemm", ["standard", "hidden", "bias"], ["sums"], "first", transB=1),
        helper.make_node("Relu", ["sums"], ["features"], "relu"),
        helper.make_node("Gemm", ["features", "last", "zeros"], ["outputs"], "second", transB=1),
        helper.make_node("Softmax", ["outputs"], ["scores"], "softmax"),
    ]
    constants = {"mean": MEAN, "std": STD, "hidden": HIDDEN, "bias": BIAS, "last": LAST, "zeros": ZEROS}
    return save(path, nodes, constants, {"outputs": 3, "scores": 3})


def activation(values: np.ndarray, calibrated: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return values as uint8 sees them, and the width of a step."""
    low, high = min(0, calibrated.min()), max(0, calibrated.max())
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step, step


def layer(values: np.ndarray, calibrated: np.ndarray, weights: np.ndarray, bias: np.ndarray, levels: int) -> np.ndarray:
    """Return the outputs of a quantised linear layer."""
    seen, step = activation(values, calibrated)
    width = np.abs(weights).max(1, keepdims=True) / levels
    coarse = np.rint(weights / width) * width
    return seen @ coarse.T + np.rint(bias / (step * width[:, 0])) * (step * width[:, 0])


def by_numpy(inputs: np.ndarray, calibrated: np.ndarray, levels: int) -> np.ndarray:
    """Return the outputs of the quantised network."""
    standard, typical = ((each - MEAN) / STD for each in (inputs, calibrated))
    features = layer(standard, typical, HIDDEN, BIAS, levels)
    typical_features = np.maximum(typical @ HIDDEN.T + BIAS, 0)
    return layer(np.maximum(features, 0), typical_features, LAST, ZEROS, levels)


@pytest.mark.parametrize(("reduce_range", "levels"), [(False, 127), (True, 64)])
def test_the_quantised_graph_computes_what_numpy_does(tmp_path: Path, reduce_range: bool, levels: int):
    network, target = save_network(tmp_path / "model.onnx"), tmp_path / "int8.onnx"
    calibrated = INPUTS[:100]
    write_quantised(network, target, [{"inputs": part} for part in np.split(calibrated, 4)], reduce_range)
    session = InferenceSession(target, providers=["CPUExecutionProvider"])
    outputs, scores = session.run(["outputs", "scores"], {"inputs": INPUTS})
    np.testing.assert_allclose(outputs, by_numpy(INPUTS, calibrated, levels), atol=2e-5)
    (exact,) = InferenceSession(network).run(["outputs"], {"inputs": INPUTS})
    assert 1e-3 < np.abs(outputs - exact).mean() < 0.05
    np.testing.assert_allclose(scores, torch.from_numpy(outputs).softmax(1).numpy(), atol=1e-6)


def test_transforms_and_predictions_stay_in_floating_point_and_nothing_foreign_is_named(tmp_path: Path):
    target = tmp_path / "int8.onnx"
    write_quantised(save_network(tmp_path / "model.onnx"), target, [{"inputs": INPUTS}], reduce_range=False)
    model = onnx.load(target)
    onnx.checker.check_model(model, full_check=True)
    quantised = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert quantised == {"standard", "features"}
    assert {each.domain for each in model.opset_import} == {""}
    sizes = {each.name: each.data_type for each in model.graph.initializer}
    assert sizes["hidden_quantized"] == sizes["last_quantized"] == TensorProto.INT8


def evaluation(inputs: np.ndarray, targets: np.ndarray) -> list[tuple[dict[str, np.ndarray], torch.Tensor]]:
    parts = zip(np.array_split(inputs, 3), np.array_split(targets, 3), strict=True)
    return [({"inputs": some}, torch.from_numpy(labels)) for some, labels in parts]


def test_the_figures_of_both_files_are_those_of_their_answers(tmp_path: Path):
    network, target = save_network(tmp_path / "model.onnx"), tmp_path / "int8.onnx"
    (exact,) = InferenceSession(network).run(["outputs"], {"inputs": INPUTS})
    targets = exact.argmax(1)
    found = quantise(network, target, [{"inputs": INPUTS}], evaluation(INPUTS, targets), Classification(), "test")
    (outputs,) = InferenceSession(target).run(["outputs"], {"inputs": INPUTS})
    assert (found.metric, found.before.figure) == ("test/accuracy", 1.0)
    assert found.after.figure == (outputs.argmax(1) == targets).mean()
    assert found.loss == 1 - found.after.figure
    assert found.before.bytes == network.stat().st_size
    assert found.after.bytes == target.stat().st_size
    assert min(found.before.cpu_seconds, found.after.cpu_seconds) > 0
    described = found.describe()
    assert (described["type"], described["calibration_examples"], described["batch_size"]) == ("int8", 200, BATCH_SIZE)


def test_a_model_that_loses_its_answers_is_refused(tmp_path: Path):
    """Its label is the sign of the first input, which steps as wide as the second input's range cannot show."""
    weights = np.array([[1, 0, 0, 0], [-1, 0, 0, 0]], np.float32)
    node = helper.make_node("Gemm", ["inputs", "weights"], ["outputs"], "linear", transB=1)
    model = save(tmp_path / "model.onnx", [node], {"weights": weights}, {"outputs": 2})
    inputs = RNG.normal(size=(100, 4)).astype(np.float32)
    inputs[:, 1] = 1e6
    targets = (inputs[:, 0] < 0).astype(np.int64)
    found = quantise(
        model, tmp_path / "int8.onnx", [{"inputs": inputs}], evaluation(inputs, targets), Classification(), "validation"
    )
    assert found.before.figure == 1.0
    with pytest.raises(ValueError, match=r"validation/accuracy from 1 to 0\.\d+, more than --tolerance 0.01"):
        found.check(0.01)
    found.check(1.0)


def test_errors_are_judged_by_their_growth_and_no_number_is_refused():
    before, after = Measurement(4, 2.0, 1.0), Measurement(1, 2.1, 1.0)
    found = Quantisation("test/mae", before, after, 512, False)
    assert found.loss == pytest.approx(0.05)
    found.check(0.06)
    for worse in (found, replace(found, after=replace(after, figure=float("nan")))):
        with pytest.raises(ValueError, match="test/mae from 2 to"):
            worse.check(0.04)
    assert replace(found, metric="test/auc").loss == pytest.approx(-0.1)


def test_a_graph_without_weights_is_refused(tmp_path: Path):
    model = save(tmp_path / "model.onnx", [helper.make_node("Relu", ["inputs"], ["outputs"])], {}, {"outputs": 4})
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        write_quantised(model, tmp_path / "int8.onnx", [{"inputs": INPUTS}], reduce_range=False)
    assert not (tmp_path / "int8.onnx").exists()
