"""Every model, and every deterministic transform: exported graphs answer as the module does, for any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.data import DataSplits, SequenceWindows, Source, TensorSource
from trainer.data.sources.signature import DataSignature
from trainer.data.transforms import Compose, Normalise, Standardise
from trainer.export.graph import Graph, trace
from trainer.export.served_model import ServedModel
from trainer.models import CNN, GPT, LSTM, MLP, DigitsCNN, Logistic, ResNet, ViT, from_transformers
from trainer.models.outputs import SelectOutput
from trainer.service.engine import OnnxEngine
from trainer.service.version import ONNX, ModelDescription
from trainer.tasks import Classification, LanguageModelling, Task

BATCHES = (1, 2, 3, 64, 359)
IMAGES, PIXELS, COLOURS, TOKENS = (1, 28, 28), (1, 8, 8), (3, 16, 16), 12

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int]] = {
    "logistic": (lambda: Logistic(64, 10), PIXELS),
    "mlp": (lambda: MLP(64, 10), PIXELS),
    "cnn": (lambda: CNN(), IMAGES),
    "digits_cnn": (lambda: DigitsCNN(), PIXELS),
    "digits_cnn_batch": (lambda: DigitsCNN(norm="batch"), PIXELS),
    "digits_cnn_group": (lambda: DigitsCNN(norm="group"), PIXELS),
    "resnet_group": (lambda: ResNet(depth=8, width=8), COLOURS),
    "resnet_batch": (lambda: ResNet(depth=8, width=8, norm="batch"), COLOURS),
    "vit": (lambda: ViT(size=16, patch=4, width=16, layers=2, heads=2), COLOURS),
    "lstm": (lambda: LSTM(20, 4, 8), TOKENS),
    "gpt": (lambda: GPT(vocabulary=20, length=16, layers=2, heads=2, width=16), TOKENS),
    "llama": (
        lambda: from_transformers(
            architecture="llama",
            config={
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "vocab_size": 20,
            },
        ),
        TOKENS,
    ),
    "gpt2": (
        lambda: from_transformers(
            architecture="gpt2", config={"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20}
        ),
        TOKENS,
    ),
}


def fitted() -> Standardise:
    standardise = Standardise()
    standardise.load_state_dict({"mean": torch.tensor([0.3]).double(), "std": torch.tensor([0.7]).double()})
    return standardise


TRANSFORMS: dict[str, Callable[[], Compose]] = {
    "none": lambda: Compose(),
    "normalise": lambda: Compose({"normalise": Normalise(0.5, 0.25)}),
    "standardise": lambda: Compose({"standardise": fitted(), "normalise": Normalise(0.1, 2.0)}, is_fitted=True),
}
# Transforms come before the model in the graph, whatever it is.
ROWS = [(name, "none" if shape == TOKENS else "standardise") for name, (_, shape) in MODELS.items()]
ROWS += [("mlp", "none"), ("mlp", "normalise")]


def make(name: str, transforms: str) -> tuple[Graph, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    if isinstance(shape, int):
        source: Source = SequenceWindows(torch.zeros(4, shape + 1, dtype=torch.uint8), shape)
        task: Task = LanguageModelling()

        def batch(count: int) -> Tensor:
            return torch.randint(20, (count, shape))
    else:
        source, task = TensorSource(torch.zeros(3, *shape), torch.zeros(3, dtype=torch.int64)), Classification()

        def batch(count: int) -> Tensor:
            return torch.rand(count, *shape)

    signature = DataSignature.of(DataSplits(source, source, 10))
    assert signature
    model = build()
    _warm(model, batch(8))
    return trace(ServedModel(_logits(model), TRANSFORMS[transforms](), task, signature)), batch


def _warm(model: nn.Module, inputs: Tensor) -> None:
    """Move batch statistics away from 0 and 1."""
    with torch.no_grad():
        model.train()
        model(inputs)
        model.eval()


def _logits(model: nn.Module) -> nn.Module:
    if hasattr(model, "config"):  # one of transformers
        model.register_forward_hook(SelectOutput("logits"))
    return model


@pytest.mark.quick_rows(2)
@pytest.mark.parametrize(("name", "transforms"), ROWS, ids=["-".join(row) for row in ROWS])
def test_graphs_answer_as_the_module_does(tmp_path: Path, name: str, transforms: str) -> None:
    import openvino

    graph, batch = make(name, transforms)
    graph.save_program(tmp_path / "model.pt2")
    graph.save_onnx(tmp_path / ONNX)
    program = torch.export.load(tmp_path / "model.pt2").module()
    engine = OnnxEngine(tmp_path, ModelDescription(graph.inputs, graph.outputs, "", "", {}), 1)
    other = openvino.compile_model(tmp_path / ONNX, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in BATCHES:
        inputs = batch(count)
        with torch.no_grad():
            expected = graph.served(inputs)
            exported = program(inputs)
        found = engine.run({"inputs": inputs.numpy()})
        theirs = dict(zip((spec.name for spec in graph.outputs), other([inputs.numpy()]).values(), strict=True))
        for output, tensor in expected.items():
            assert torch.equal(exported[output], tensor), (count, output)
            if tensor.is_floating_point():
                scale = max(1.0, tensor.abs().max().item())
                np.testing.assert_allclose(found[output], tensor, rtol=0, atol=1e-5 * scale)
                np.testing.assert_allclose(theirs[output], tensor, rtol=0, atol=1e-4 * scale)
        assert (found["outputs"].argmax(-1) == expected["outputs"].argmax(-1).numpy()).mean() > 0.999
