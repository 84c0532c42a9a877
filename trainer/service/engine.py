"""Engines, which compute a version: a session of ONNX Runtime, or PyTorch where there is only an exported program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.service.exported_program import ExportedProgramEngine
from trainer.service.version import ONNX, ModelDescription

Tensors = dict[str, np.ndarray]

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # the first that this ONNX Runtime has


class Engine(Protocol):
    """A loaded model.

    Attributes:
        platform: Triton's name of its kind.
    """

    platform: str

    def run(self, inputs: Tensors) -> Tensors:
        """Compute all outputs, by name, of inputs that are as the model's description says.

        Raises:
            ValueError: the model refuses these values, such as a token outside its vocabulary.
        """
        ...


def load_engine(folder: Path, description: ModelDescription, threads: int | None = None) -> Engine:
    """Load a version.

    Args:
        folder: of the version.
        description: of the version, by `read_version`.
        threads: of an operation; None: one for each core of this process.

    Raises:
        ValueError: its file cannot be loaded, or needs PyTorch, which is not installed.
    """
    threads = threads or len(os.sched_getaffinity(0))
    kind = OnnxEngine if ONNX in description.sha256 else ExportedProgramEngine
    return kind(folder, description, threads)


class OnnxEngine:
    """A session of ONNX Runtime."""

    platform = "onnxruntime_onnx"

    def __init__(self, folder: Path, description: ModelDescription, threads: int):
        import onnxruntime as ort  # an extra
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        # Threads that spin take the processor from everything else on this machine, and from the server itself.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        available = ort.get_available_providers()
        providers = [provider for provider in PROVIDERS if provider in available]
        self._names = [spec.name for spec in description.outputs]
        self._invalid = InvalidArgument
        try:
            self._session: Any = ort.InferenceSession(folder / ONNX, options, providers)
        except Exception as error:  # it has a class of errors for each of its statuses, with no base of their own
            raise ValueError(f"{folder / ONNX} cannot be loaded: {error}") from error

    def run(self, inputs: Tensors) -> Tensors:
        try:
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))
        except self._invalid as error:
            raise ValueError(str(error)) from error
