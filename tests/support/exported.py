"""Exported versions made by hand: small graphs of ONNX, whose answers say which version has computed them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from trainer.service.version import (
    DESCRIPTION,
    EXAMPLE_REQUEST,
    EXAMPLE_RESPONSE,
    ONNX,
    ModelDescription,
    TensorSpec,
    checksums,
)

INPUTS = [TensorSpec("inputs", "FP32", [-1, 4])]
OUTPUTS = [TensorSpec("outputs", "FP32", [-1, 3]), TensorSpec("label", "INT64", [-1])]


def weights(number: int) -> np.ndarray:
    """Return the matrix of a version: the answer to ones is four times its number, and a little."""
    return np.full((4, 3), number, np.float32) + np.arange(3, dtype=np.float32) / 8


def write_linear(model: Path, number: int, *, metrics: dict[str, float | None] | None = None) -> Path:
    """Write version `number` of a linear model with 4 inputs and 3 classes; return its folder."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["inputs", "weight"], ["outputs"]),
            helper.make_node("ArgMax", ["outputs"], ["label"], axis=1, keepdims=0),
        ],
        "linear",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [onnx.numpy_helper.from_array(weights(number), "weight")],
    )
    example = np.ones((1, 4), np.float32)
    answer = {"outputs": example @ weights(number), "label": np.array([2])}
    return write_version(model, number, graph, INPUTS, OUTPUTS, {"inputs": example}, answer, metrics or {})


def write_version(
    model: Path,
    number: int,
    graph: onnx.GraphProto,
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    example: dict[str, np.ndarray],
    answer: dict[str, np.ndarray],
    metrics: dict[str, float | None],
) -> Path:
    """Write a version of a graph as export does: aside, then renamed."""
    aside = model / f".{number}-aside"
    aside.mkdir(parents=True)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto)
    onnx.save(proto, aside / ONNX)
    (aside / EXAMPLE_REQUEST).write_text(json.dumps({"inputs": _tensors(example, inputs)}))
    response = {"model_name": model.name, "model_version": str(number), "outputs": _tensors(answer, outputs)}
    (aside / EXAMPLE_RESPONSE).write_text(json.dumps(response))
    description = ModelDescription(
        inputs=inputs,
        outputs=outputs,
        task="Classification",
        headline=next(iter(metrics), ""),
        sha256=checksums(aside),
        metrics=metrics,
    )
    (aside / DESCRIPTION).write_text(description.to_json())
    return aside.rename(model / str(number))


def _tensors(values: dict[str, np.ndarray], specs: list[TensorSpec]) -> list[dict[str, object]]:
    return [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(values[spec.name].shape),
            "data": values[spec.name].ravel().tolist(),
        }
        for spec in specs
    ]
