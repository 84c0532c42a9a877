"""The models of the benchmark, exported, with a request of each in both protocols."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn
from tritonclient.grpc import service_pb2 as messages

from scripts.bench.serve.peers.session import open_session
from trainer.models import DigitsCNN, ResNet
from trainer.service.version import DESCRIPTION, ONNX, ModelDescription, TensorSpec, checksums

SMALL, BIG = "digits", "resnet20"
CLASSES = 10


@dataclass(frozen=True)
class Exported:
    """A model in the folder.

    Attributes:
        name: of it.
        request: for one image, in the protocol's JSON.
        message: the same in the protocol's protobuf.
        scores: the answer of the bare session.
        session: the bare one.
        image: float32 [1, C, H, W].
    """

    name: str
    request: dict[str, Any]
    message: bytes
    scores: np.ndarray
    session: ort.InferenceSession
    image: np.ndarray

    def run(self, batch: int) -> None:
        """Compute a batch of equal images in the bare session."""
        self.session.run(None, {"inputs": np.repeat(self.image, batch, axis=0)})


class _Answers(nn.Module):
    """A classifier with the outputs of an exported one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.model(inputs)
        return outputs, outputs.softmax(1), outputs.argmax(1)


def write_models(folder: Path) -> dict[str, Exported]:
    """Export both models into a folder of the layout of servers, and return them by their names."""
    torch.manual_seed(0)
    return {
        SMALL: _write(folder, SMALL, DigitsCNN(), (1, 8, 8)),
        BIG: _write(folder, BIG, ResNet(), (3, 32, 32)),
    }


def _write(folder: Path, name: str, model: nn.Module, shape: tuple[int, ...]) -> Exported:
    version = folder / name / "1"
    version.mkdir(parents=True)
    image = torch.rand(1, *shape)
    torch.onnx.export(
        _Answers(model).eval(),
        (torch.rand(2, *shape),),
        version / ONNX,
        input_names=["inputs"],
        output_names=["outputs", "scores", "label"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    description = ModelDescription(
        inputs=[TensorSpec("inputs", "FP32", [-1, *shape])],
        outputs=[
            TensorSpec("outputs", "FP32", [-1, CLASSES]),
            TensorSpec("scores", "FP32", [-1, CLASSES]),
            TensorSpec("label", "INT64", [-1]),
        ],
        task="classification",
        headline="",
        sha256=checksums(version),
    )
    (version / DESCRIPTION).write_text(description.to_json())
    session = open_session(version / ONNX)
    values = image.flatten().tolist()
    tensor = {"name": "inputs", "datatype": "FP32", "shape": list(image.shape), "data": values}
    message: Any = messages.ModelInferRequest(  # pyright: ignore[reportAttributeAccessIssue]
        model_name=name, raw_input_contents=[image.numpy().tobytes()]
    )
    message.inputs.add(name="inputs", datatype="FP32", shape=image.shape)
    return Exported(
        name=name,
        request={"inputs": [tensor]},
        message=message.SerializeToString(),
        scores=np.asarray(session.run(["scores"], {"inputs": image.numpy()})[0]),
        session=session,
        image=image.numpy(),
    )
