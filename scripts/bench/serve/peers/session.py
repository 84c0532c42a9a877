"""The session of ONNX Runtime that all servers of the benchmark have, with one thread."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort


def open_session(path: Path) -> ort.InferenceSession:
    """Open a model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sessions(models: Path) -> dict[str, ort.InferenceSession]:
    """Open version 1 of every model of a folder, by their names."""
    return {path.parents[1].name: open_session(path) for path in sorted(models.glob("*/1/model.onnx"))}
