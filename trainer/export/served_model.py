"""The module that is exported: raw inputs in, outputs and predictions by name out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.sources.signature import DataSignature
from trainer.data.transforms import Compose
from trainer.models.calling import call_model
from trainer.models.outputs import describe_outputs, named_outputs
from trainer.tasks import Task

CPU = torch.device("cpu")


class ServedModel(nn.Module):
    """A model between the transforms of evaluation and the predictions of its task.

    It takes the tensors of a batch in the order of the signature, and returns tensors by name: `outputs`, or if the
    model returns several those of its own names, and what `Task.predictions` makes of them.

    Args:
        model: to be exported; in evaluation mode afterwards.
        transforms: of the run, fitted.
        task: of the run.
        signature: the raw inputs.
    """

    def __init__(self, model: nn.Module, transforms: Compose, task: Task, signature: DataSignature):
        super().__init__()
        self.model, self.transforms, self.task, self.signature = model, transforms, task, signature
        self.eval()

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        examples = self.signature.tree(tensors), _no_targets(tensors[0])
        inputs, _ = self.transforms.for_evaluation(examples, CPU)
        outputs = call_model(self.model, inputs)
        named, predict = _by_name(outputs), getattr(self.task, "predictions", None)
        predicted: Mapping[str, Tensor] = predict(outputs) if predict else {}
        if twice := named.keys() & predicted.keys():
            raise ValueError(
                f"both the model and its task have an output {sorted(twice)[0]}\n  rename one, or set task.output="
            )
        return {**named, **predicted}


def _no_targets(tensor: Tensor) -> Tensor:
    """Return targets for transforms, which take whole examples; none of evaluation makes inputs of targets."""
    return torch.zeros(tensor.shape[0], dtype=torch.int64)


def _by_name(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors that a model returns by their names, or else `outputs_0`, `outputs_1` and so on."""
    if isinstance(outputs, Tensor):
        return {"outputs": outputs}
    given = named_outputs(outputs)
    names = [name for name in given if isinstance(name, str)] or list(given)  # a named tuple has indices, too
    tensors = {name: given[name] for name in names if isinstance(given[name], Tensor)}
    if not tensors:
        raise ValueError(f"the model returns {describe_outputs(outputs)}, and no tensor\n  set task.output=")
    return {name if isinstance(name, str) else f"outputs_{name}": tensor for name, tensor in tensors.items()}
