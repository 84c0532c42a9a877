"""Check the components of a run against each other: model, data and task; patterns and the names they match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.algorithms import Algorithm
from trainer.config.instantiate import class_name
from trainer.config.schema import ComponentConfig, typed_overrides
from trainer.data import DataSplits, Padding, PerClientSource, Source
from trainer.data.loading.silo_files import describe_example
from trainer.data.sources.column import first_outside
from trainer.models.calling import call_model
from trainer.models.outputs import describe_outputs, named_outputs
from trainer.optim import GroupedOptimizerFactory
from trainer.tasks import Task
from trainer.utils.tensor_trees import Tree, describe
from trainer.utils.trees import flatten
from trainer.utils.user_code import user_location

MAX_CHECKED_EXAMPLES = 64  # of data that is not in memory
PART_NAMES = {"train": "training"}  # in messages, where they are not those of DataSplits
UNPACKED = "set data.packed=false, or a model that keeps texts apart by position_ids, such as model=gpt"


@torch.no_grad()
def check_model_fits_data(module: nn.Module, task: Task, data: DataSplits, component: ComponentConfig) -> None:
    """Check that the model accepts the data, and the task the model's outputs.

    Args:
        module: the model.
        task: scores its outputs.
        data: two of its training examples are used.
        component: the configuration of the model. The error names the keys to change.

    Raises:
        ValueError: they do not fit.
    """
    inputs, targets = data.train.fetch(torch.arange(min(2, len(data.train))))
    try:
        outputs = call_model(module.eval(), inputs)
    except Exception as error:
        shape, reason, location = describe(inputs), str(error).split("\n")[0], user_location(error)
        if reason.startswith("task.output="):
            raise
        where = f" ({type(error).__name__})\n  in {location}" if location else ""
        vocabulary = getattr(data.train, "vocabulary", data.classes)  # of tokens, which may not be those to predict
        way_out = _inputs_for(module, inputs) or _model_for(inputs, vocabulary, component)
        way_out = UNPACKED if "argument 'position_ids'" in reason else way_out
        raise ValueError(
            f"model={class_name(module)} cannot take examples of shape {shape}: {reason}{where}\n  {way_out}"
        ) from error
    finally:
        module.train()
    takes_trees = getattr(task, "takes_trees", False)
    if not takes_trees and not isinstance(outputs, Tensor):
        names = " or ".join(f"task.output={name}" for name in named_outputs(outputs))
        raise ValueError(
            f"model={class_name(module)} gives {describe_outputs(outputs)}, and a task takes one tensor.\n"
            f"  {f'set {names}' if names else 'return a tensor'}"
        )
    if not takes_trees and not isinstance(targets, Tensor):
        raise ValueError(
            f"data= gives targets that are {describe_outputs(targets)}, and task={class_name(task)} takes one tensor.\n"
            "  give one of them as the target, or set task=custom with a task that has takes_trees = True"
        )
    padding: Padding | None = getattr(data.train, "padding", None)
    if padding and padding.padded_targets and not hasattr(task, "counted_units"):
        raise ValueError(
            f"data= has targets of different lengths, and task={class_name(task)} would count their padding.\n"
            "  set task=language_modelling, or a task that has a method counted_units"
        )
    if fault := task.mismatch(outputs, targets, data.classes):
        raise ValueError(f"model={class_name(module)} does not fit task={class_name(task)}: {fault}")
    _check_packed_texts(module, data)


def _inputs_for(module: nn.Module, inputs: Tree) -> str:
    """Describe how to convert the inputs, if the model takes them in the dtype of its parameters."""
    if not isinstance(inputs, Tensor):
        return ""
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), inputs.dtype)
    try:
        if dtype == inputs.dtype:
            return ""
        module.eval()(inputs.to(dtype))
    except Exception:
        return ""
    name = str(dtype).removeprefix("torch.")
    kind = "" if inputs.is_floating_point() else ", as of tokens"
    return f"the inputs are {inputs.dtype}{kind}: convert them to {name}, in a .npz file by x.astype('{name}')"


def _model_for(inputs: Tree, vocabulary: int | None, component: ComponentConfig) -> str:
    """Describe how to change a model for these inputs: numbers, or tokens if they are integers."""
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(tokens, Tensor) and (changes := _size_changes(tokens, vocabulary, component)):
        return f"set {' '.join(changes)}"
    if not isinstance(inputs, Tensor):
        call = f"**{{{', '.join(inputs)}}}" if isinstance(inputs, Mapping) else f"*{len(inputs)} inputs"
        return f"it was called as model({call}): choose another model=, or other inputs in data="
    return f"choose another model= or data={typed_overrides('model', component)}"


def _size_changes(inputs: Tensor, vocabulary: int | None, component: ComponentConfig) -> list[str]:
    """Return the overrides of a model's sizes that these inputs need."""
    given = flatten(component, "model.")
    if inputs.is_floating_point():
        wanted: dict[str, Any] = {"model.inputs": inputs[0].numel()}
        return [f"{key}={value}" for key, value in wanted.items() if key in given and given[key] != value]
    sizes = {"vocabulary": vocabulary, "config.vocab_size": vocabulary, "length": inputs.shape[-1]}
    wanted = {f"model.{key}": value for key, value in sizes.items()}
    return [f"{key}={value}" for key, value in wanted.items() if value and (given.get(key) or value) < value]


@torch.no_grad()
def _check_packed_texts(module: nn.Module, data: DataSplits) -> None:
    """Check that a model keeps packed texts apart: another first text changes no output of the second.

    Raises:
        ValueError: it lets them see each other.
    """
    source = (
        next(iter(data.train.local.values()), data.train) if isinstance(data.train, PerClientSource) else data.train
    )
    inputs, _ = source.fetch(torch.arange(min(MAX_CHECKED_EXAMPLES, len(source))))
    if not isinstance(inputs, dict) or "position_ids" not in inputs:
        return
    positions = inputs["position_ids"]
    starts = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)  # padding has zeros too
    row = int(starts.sum(1).argmax())
    first, second, *_ = [*starts[row].nonzero().flatten().tolist(), positions.shape[1], positions.shape[1]]
    packed = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    altered = packed["input_ids"].clone()
    altered[:, first:second] = (altered[:, first:second] + 1) % (data.classes or 2)
    one, other = (call_model(module.eval(), {**packed, "input_ids": ids}) for ids in (packed["input_ids"], altered))
    module.train()
    if not torch.allclose(one[:, second:], other[:, second:], rtol=1e-4, atol=1e-5):
        raise ValueError(f"model={class_name(module)} lets packed texts see each other.\n  {UNPACKED}")


def check_labels(data: DataSplits) -> None:
    """Check that integer targets are below the number of classes: of data in memory all, of other data the first.

    Raises:
        ValueError: a target is outside the classes; names its example.
    """
    if not data.classes:
        return
    for part, source in {PART_NAMES.get(name, name): source for name, source in data.parts.items()}.items():
        targets = getattr(source, "targets", None)
        if not isinstance(targets, Tensor):
            targets = _first_targets(source, part) if source.labels is None else torch.from_numpy(source.labels)
        if outside := first_outside(targets, data.classes):
            example, label = outside
            raise ValueError(
                f"data= has label {label} in example {example} of its {part} examples, but {data.classes} classes.\n"
                f"  valid: 0 to {data.classes - 1}"
            )


def check_validation(data: DataSplits) -> None:
    """Check that the validation examples have the shapes and dtypes of the training examples.

    Raises:
        ValueError: they have others.
    """
    if not data.has_validation:
        return
    sources = (data.train, data.validation)
    train, validation = map(describe_example, sources)
    if train != validation:
        raise ValueError(
            f"data= has validation inputs and targets of {' and '.join(validation)}, and those of training are "
            f"{' and '.join(train)}.\n"
            "  make them alike, or set data.validation=0.1 to take a part of the training examples"
        )


def _first_targets(source: Source, part: str) -> Tensor:
    try:
        return source.fetch(torch.arange(min(MAX_CHECKED_EXAMPLES, len(source))))[1]
    except ValueError as error:
        raise ValueError(f"data=, the {part} examples: {error}") from error


def check_shared_params(algorithm: Algorithm, module: nn.Module, component: ComponentConfig) -> None:
    """Check that the algorithm's pattern separates shared from personal parameters.

    A pattern that matches every name, or none, would silently make it another algorithm.

    Raises:
        ValueError: the pattern matches all names of the model, or none.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    pattern = component.get("shared_params", ".*")
    if pattern != "$^" and not any(map(algorithm.is_shared, names)):
        raise ValueError(
            f"algorithm.shared_params={pattern} matches no parameter of model={class_name(module)}: "
            f"clients would train alone.\n  its names: {', '.join(names)}\n  set another pattern, or algorithm=local"
        )
    if pattern != ".*" and all(map(algorithm.is_shared, names)):
        raise ValueError(
            f"algorithm.shared_params={pattern} matches every parameter of model={class_name(module)}: "
            f"none is left to clients.\n  its names: {', '.join(names)}\n  set another pattern, or another model"
        )


def check_lr_multipliers(optimizer: GroupedOptimizerFactory, module: nn.Module) -> None:
    """Check that each pattern of lr_multipliers matches a parameter of the model.

    Raises:
        ValueError: a pattern matches none.
    """
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if unused := optimizer.unused(names):
        raise ValueError(
            f"optimizer.lr_multipliers: no parameter of model={class_name(module)} matches {', '.join(unused)}.\n"
            f"  its names: {', '.join(names)}"
        )
