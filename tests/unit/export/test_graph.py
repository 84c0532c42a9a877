"""The graph of a served model: raw inputs, any batch, predictions of the task; the same in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.data import DataSplits, Padding, SequenceWindows, TensorSource
from trainer.data.sources.signature import DataSignature
from trainer.data.sources.torch_datasets import MapDatasetSource
from trainer.data.transforms import Compose, Normalise
from trainer.export.graph import Graph, trace
from trainer.export.made_up import make_inputs
from trainer.export.model_folder import write_version
from trainer.export.served_model import ServedModel
from trainer.export.version_files import Format, VersionFiles
from trainer.models import GPT, LSTM, MLP
from trainer.models.outputs import SelectOutput
from trainer.service.engine import load_engine
from trainer.service.version import ModelDescription, TensorSpec, read_version
from trainer.tasks import Classification, LanguageModelling, MultiLabel, Regression, Task

ROWS = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def signature_of(inputs: Any, classes: int | None = None, label_names: tuple[str, ...] = ()) -> DataSignature:
    source = TensorSource(inputs, torch.zeros(6, dtype=torch.int64))
    signature = DataSignature.of(DataSplits(source, source, classes, label_names=label_names))
    assert signature and DataSignature.from_json(signature.to_json()) == signature
    return signature


def traced(model: nn.Module, task: Task, inputs: Any = ROWS, transforms: Compose | None = None) -> Graph:
    return trace(ServedModel(model, transforms or Compose(), task, signature_of(inputs)))


def write(graph: Graph, models: Path, *formats: Format) -> Path:
    description = ModelDescription(graph.inputs, graph.outputs, "classification", "", {})
    return write_version(models, "tiny", VersionFiles("tiny", graph, description, formats or ("onnx",)))


def answers(folder: Path, **inputs: Tensor) -> dict[str, np.ndarray]:
    return load_engine(folder, read_version(folder)).run({name: each.numpy() for name, each in inputs.items()})


def test_raw_inputs_are_transformed_in_the_graph(tmp_path: Path):
    model, transforms = nn.Linear(4, 3), Compose({"normalise": Normalise(0.5, 0.25)})
    folder = write(traced(model, Classification(), transforms=transforms), tmp_path)
    expected = model((ROWS - 0.5) / 0.25)
    found = answers(folder, inputs=ROWS)
    assert list(found) == ["outputs", "scores", "label"]
    torch.testing.assert_close(torch.from_numpy(found["outputs"]), expected)
    torch.testing.assert_close(torch.from_numpy(found["scores"]), expected.softmax(1))
    assert found["label"].tolist() == expected.argmax(1).tolist()


def test_each_task_has_its_predictions(tmp_path: Path):
    model = nn.Linear(4, 3)
    outputs = TensorSpec("outputs", "FP32", [-1, 3])
    scores = TensorSpec("scores", "FP32", [-1, 3])
    assert traced(model, Classification()).outputs == [outputs, scores, TensorSpec("label", "INT64", [-1])]
    assert traced(model, Regression()).outputs == [outputs]
    graph = traced(model, MultiLabel())
    assert graph.outputs == [outputs, scores, TensorSpec("label", "INT64", [-1, 3])]
    found = answers(write(graph, tmp_path), inputs=ROWS)
    torch.testing.assert_close(torch.from_numpy(found["scores"]), model(ROWS).sigmoid())
    assert (found["label"] == (model(ROWS) > 0).numpy()).all()


class TwoHeads(nn.Module):
    def __init__(self, as_dict: bool):
        super().__init__()
        self.first, self.second, self.as_dict = nn.Linear(4, 3), nn.Linear(4, 2), as_dict

    def forward(self, left: Tensor, right: Tensor) -> Any:
        first, second = self.first(left), self.second(right)
        return {"logits": first, "hidden": second, "cache": None} if self.as_dict else (first, second)


class NoPredictions(Regression):
    takes_trees = True


def test_trees_of_inputs_and_outputs_have_names(tmp_path: Path):
    by_name = traced(TwoHeads(as_dict=True), NoPredictions(), {"left": ROWS, "right": ROWS + 1})
    assert [spec.name for spec in by_name.inputs] == ["left", "right"]
    assert [spec.name for spec in by_name.outputs] == ["logits", "hidden"]
    by_place = traced(TwoHeads(as_dict=False), NoPredictions(), (ROWS, ROWS + 1))
    assert [spec.name for spec in by_place.inputs] == ["inputs_0", "inputs_1"]
    assert [spec.name for spec in by_place.outputs] == ["outputs_0", "outputs_1"]
    model = by_place.served.model
    found = answers(write(by_place, tmp_path), inputs_0=ROWS, inputs_1=ROWS * 2)
    torch.testing.assert_close(torch.from_numpy(found["outputs_1"]), model(ROWS, ROWS * 2)[1])


def test_the_output_that_the_task_takes_is_the_one_exported():
    model = TwoHeads(as_dict=True)
    model.register_forward_hook(SelectOutput("hidden"))
    graph = traced(model, Classification(), {"left": ROWS, "right": ROWS})
    assert graph.outputs[0] == TensorSpec("outputs", "FP32", [-1, 2])


def windows(length: int) -> DataSignature:
    source = SequenceWindows(torch.zeros(4, length + 1, dtype=torch.uint8), length)
    signature = DataSignature.of(DataSplits(source, source, 20))
    assert signature
    return signature


def test_tokens_have_any_length_where_the_model_allows_it(tmp_path: Path):
    model = GPT(vocabulary=20, length=16, layers=1, heads=2, width=8)
    graph = trace(ServedModel(model, Compose(), LanguageModelling(), windows(16)))
    assert graph.inputs == [TensorSpec("inputs", "INT64", [-1, -1])]
    assert graph.outputs == [TensorSpec("outputs", "FP32", [-1, -1, 20])]
    folder = write(graph, tmp_path)
    for shape in ((1, 1), (2, 16), (5, 7)):
        tokens = torch.randint(20, shape)
        torch.testing.assert_close(torch.from_numpy(answers(folder, inputs=tokens)["outputs"]), model(tokens))


def test_a_model_of_one_length_has_any_batch():
    graph = trace(ServedModel(LSTM(20, 4, 8), Compose(), LanguageModelling(), windows(6)))
    assert graph.inputs == [TensorSpec("inputs", "INT64", [-1, 6])]
    assert graph.outputs == [TensorSpec("outputs", "FP32", [-1, 6, 20])]


class Bag(nn.Module):
    """The mean of the embeddings that the mask leaves."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, :, None].float()
        return self.head((self.tokens(input_ids) * mask).sum(1) / mask.sum(1))


def test_padded_inputs_have_any_length(tmp_path: Path):
    examples = [({"input_ids": list(range(count))}, 0) for count in (3, 5, 8)]
    source = MapDatasetSource(examples, classes=2)  # pyright: ignore[reportArgumentType]
    source.collate_fn = Padding({"input_ids": 0})
    signature = DataSignature.of(DataSplits(source, source, 2))
    assert signature and signature.inputs == [
        TensorSpec("input_ids", "INT64", [-1, -1]),
        TensorSpec("attention_mask", "INT64", [-1, -1]),
    ]
    folder = write(trace(ServedModel(Bag(), Compose(), Classification(), signature)), tmp_path)
    for length in (1, 4, 30):
        ids, mask = torch.randint(9, (2, length)), torch.ones(2, length, dtype=torch.int64)
        assert answers(folder, input_ids=ids, attention_mask=mask)["outputs"].shape == (2, 2)


def test_made_up_inputs_fit_the_model_and_are_the_same_every_time():
    signature = windows(50)
    (tokens,) = make_inputs(signature, GPT(vocabulary=7, layers=1), 20, 5)
    assert tokens.shape == (20, 50) and tokens.min() == 0 and tokens.max() == 6
    again = make_inputs(signature, GPT(vocabulary=7, layers=1), 20, 5)[0]
    assert torch.equal(tokens, again)
    masked = signature_of({"pixels": ROWS.half(), "pixel_mask": ROWS.long(), "is_new": ROWS > 0.5})
    pixels, mask, is_new = make_inputs(masked, nn.Identity(), 2, 5)
    assert pixels.dtype is torch.float16 and pixels.min() >= 0 and pixels.max() < 1
    assert mask.eq(1).all() and is_new.all()


def test_the_example_is_a_request_with_its_reply(tmp_path: Path):
    folder = write(traced(nn.Linear(4, 3), Classification()), tmp_path)
    request = json.loads((folder / "example.json").read_text())
    assert request["inputs"][0] | {"data": None} == {
        "name": "inputs",
        "datatype": "FP32",
        "shape": [1, 4],
        "data": None,
    }
    reply = json.loads((folder / "example_response.json").read_text())
    found = answers(folder, inputs=torch.tensor(request["inputs"][0]["data"]).view(1, 4))
    assert reply["model_name"] == "tiny"
    for output in reply["outputs"]:
        assert np.array(output["data"], found[output["name"]].dtype).tolist() == found[output["name"]].ravel().tolist()


def test_nothing_in_a_graph_tells_where_it_was_traced(tmp_path: Path):
    folder = write(traced(MLP(inputs=4, hidden=3), Classification()), tmp_path, "onnx", "pt2")
    for path in folder.rglob("*"):
        content = path.read_bytes()
        assert b".py" not in content and str(Path.home()).encode() not in content, path


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gate(inputs)


class Gate(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else -inputs


class OneSize(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.zeros(len(inputs), 4).int()


class NoCounterpart(nn.Module):
    def __init__(self):
        super().__init__()
        self.rotation = Rotation()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rotation(inputs)


class Rotation(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(inputs[:, None, :1] * inputs[:, :1, None])[:, 0]


class Scalar(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sum()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"decides by the values of tensors(.|\n)*in layer gate \(Gate\), .*test_graph.py, line"),
        (OneSize(), r"number of examples a constant: len\(x\) does\n  write x.shape\[0\]"),
        (Scalar(), r"have the shape \[\] for 3 examples"),
        (nn.Linear(5, 2), r"cannot be exported: .*mat1 and mat2 .*(.|\n)*in Linear"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused_in_a_sentence(model: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        traced(model, Regression())


def test_an_operation_that_onnx_lacks_is_named(tmp_path: Path):
    graph = traced(NoCounterpart(), Regression())
    expected = (
        r"cannot be converted to ONNX, which has no aten.linalg_matrix_exp.default \(in layer rotation \(Rotation\)"
    )
    with pytest.raises(ValueError, match=expected):
        write(graph, tmp_path)
    folder = write(graph, tmp_path, "pt2")
    torch.testing.assert_close(torch.from_numpy(answers(folder, inputs=ROWS)["outputs"]), graph.served.model(ROWS))
