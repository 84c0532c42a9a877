"""Whether the pieces of a run go together: model, data and task; names and the patterns that look for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.algorithms import Algorithm
from trainer.config.schema import ComponentConfig, typed_overrides
from trainer.data import DataSplits, TensorSource
from trainer.optim import GroupedOptimizerFactory
from trainer.tasks import Task

MAX_CHECKED_EXAMPLES = 64  # examples of data that has no column of labels


@torch.no_grad()
def check_model_fits_data(module: nn.Module, task: Task, data: DataSplits, component: ComponentConfig) -> None:
    """Raises ValueError when the model cannot take the data, or its output cannot be judged by the task.

    `component` is what the model was made of: those of its keys that the data settles are the way out.
    """
    inputs, targets = data.train.fetch(torch.arange(min(2, len(data.train))))
    try:
        outputs = module.eval()(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shape, reason = list(inputs.shape[1:]), str(error).split("\n")[0]
        way_out = _model_for(inputs, data.classes, component)
        raise ValueError(
            f"model={_class_name(module)} cannot take examples of shape {shape}: {reason}\n  {way_out}"
        ) from error
    finally:
        module.train()
    if fault := task.mismatch(outputs, targets, data.classes):
        raise ValueError(f"model={_class_name(module)} does not fit task={_class_name(task)}: {fault}")


def _model_for(inputs: Tensor, classes: int | None, component: ComponentConfig) -> str:
    """What to change of a model that cannot take these inputs: numbers, or tokens if they are integers."""
    wanted = {"vocabulary": classes, "length": inputs.shape[-1]}
    if inputs.is_floating_point():
        wanted = {"inputs": inputs[0].numel()}
    changes = [f"model.{key}={value}" for key, value in wanted.items() if key in component and component[key] != value]
    return (
        f"set {' '.join(changes)}"
        if changes
        else f"choose another model= or data={typed_overrides('model', component)}"
    )


def check_labels(data: DataSplits) -> None:
    """Raises ValueError for labels of no class; of data without a column of them the first examples are looked at."""
    if not data.classes:
        return
    for part, source in (("training", data.train), ("test", data.test)):
        first = torch.arange(min(MAX_CHECKED_EXAMPLES, len(source)))
        labels = TensorSource(*source.fetch(first)).labels if source.labels is None else source.labels
        if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < data.classes:
            outside = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(
                f"data= has label {outside} among its {part} examples, but {data.classes} classes.\n"
                f"  valid: 0 to {data.classes - 1}"
            )


def check_shared_params(algorithm: Algorithm, module: nn.Module, component: ComponentConfig) -> None:
    """Raises ValueError when the algorithm's pattern of shared names parts nothing.

    A pattern that finds every name, or none, would make it another algorithm without a word.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    pattern = component.get("shared_params", ".*")
    if pattern != "$^" and not any(map(algorithm.is_shared, names)):
        raise ValueError(
            f"algorithm.shared_params={pattern} finds no name of model={_class_name(module)}: clients would train alone.\n"
            f"  its names: {', '.join(names)}\n  set another pattern, or algorithm=local"
        )
    if pattern != ".*" and all(map(algorithm.is_shared, names)):
        raise ValueError(
            f"algorithm.shared_params={pattern} finds every name of model={_class_name(module)}: none is left to clients.\n"
            f"  its names: {', '.join(names)}\n  set another pattern, or another model"
        )


def check_lr_multipliers(optimizer: GroupedOptimizerFactory, module: nn.Module) -> None:
    """Raises ValueError when a pattern of lr_multipliers finds none of the model's parameters."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if unused := optimizer.unused(names):
        raise ValueError(
            f"optimizer.lr_multipliers: no parameter of model={_class_name(module)} goes by {', '.join(unused)}.\n"
            f"  its names: {', '.join(names)}"
        )


def _class_name(thing: object) -> str:
    return type(thing).__name__
