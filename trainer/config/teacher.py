"""The teacher of a distillation: the model of a finished run, or an exported version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.run_dir import RunDir
from trainer.config.saved_model import PARTS, load_model
from trainer.config.saved_transforms import load_transforms
from trainer.config.schema import Config
from trainer.config.targets import check_run_targets, find_targets
from trainer.data import DataSplits
from trainer.loop.local_tensors import digest
from trainer.models.calling import call_model
from trainer.models.outputs import SelectOutput, describe_outputs
from trainer.service.engine import load_engine
from trainer.service.version import DESCRIPTION, read_version, sha256
from trainer.utils.hardware import to_device
from trainer.utils.seeding import derive_seed
from trainer.utils.tensor_trees import Tree, describe, first_tensor, named_tensors


@dataclass(frozen=True)
class Teacher:
    """A trained model that takes raw inputs.

    Attributes:
        folder: where it is.
        answer: returns its outputs for raw inputs, on their device.
        fingerprint: a hash of all that its answers depend on.
    """

    folder: str
    answer: Callable[[Tree], Any]
    fingerprint: str

    def __call__(self, inputs: Tree) -> Any:
        return self.answer(inputs)


def load_teacher(config: Config, device: torch.device) -> Teacher | None:
    """Load the teacher that task.teacher= names: a finished run, or an exported version. None if the task has none.

    The classes of a run are silotrain's, those of the user's configuration files, or of modules in the working
    directory.

    Raises:
        ValueError: the folder has no finished run and no version, names other code, or is that of this run.
    """
    path = config.task.get("teacher")
    if path is None:
        return None
    folder = Path(path).expanduser()
    try:
        if (folder / DESCRIPTION).is_file():
            return _of_version(folder)
        return _of_run(RunDir(folder), config, device)
    except ValueError as error:
        raise ValueError(f"task.teacher={path}: {error}") from error


def _of_run(folder: RunDir, config: Config, device: torch.device) -> Teacher:
    """Load the model of a run, behind the transforms that the run evaluates it with."""
    if folder.path.resolve() == Path(str(config.run_dir)).resolve():
        raise ValueError("that is the folder of this run\n  choose a finished run, or another run_dir")
    if not folder.config.is_file():
        raise ValueError(
            f"it has neither a run's config.yaml nor a version's {DESCRIPTION}\n"
            "  valid: the folder of a finished run, or of an exported version, such as MODELS/digits/3"
        )
    settings = folder.settings()
    parts = {name: settings[name] for name in (*PARTS, "transforms") if name in settings}
    check_run_targets(parts, folder.config)
    trust = [*find_targets(parts)]
    module = load_model(folder.path, config.task.get("teacher_weights", "best"), trust)
    if (output := settings["task"]["output"]) is not None:
        module.register_forward_hook(SelectOutput(output))
    transforms = load_transforms(folder.path, trust)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **transforms.state_dict()}
    fingerprint = f"{digest(tensors):016x}-{derive_seed(json.dumps(settings['transforms'])):016x}"
    module = module.to(device).requires_grad_(False)

    def answer(inputs: Tree) -> Any:
        # The transforms take targets along, of which a teacher has none.
        transformed, _ = transforms.for_evaluation((inputs, torch.empty(0)), device)
        return call_model(module, transformed)

    return Teacher(str(folder.path), answer, fingerprint)


def _of_version(folder: Path) -> Teacher:
    """Load an exported version, which has its transforms in its graph."""
    description = read_version(folder)
    try:
        engine = load_engine(folder, description, torch.get_num_threads())
    except ImportError as error:
        raise ValueError(f"{error}\n  pip install silotrain[serve]") from error
    names = [spec.name for spec in description.inputs]

    def answer(inputs: Tree) -> Tensor:
        named = named_tensors(inputs)
        if named.keys() != {*names}:  # those of a tensor, or of a tuple, which has them in this order
            named = dict(zip(names, named.values(), strict=True))
        outputs = engine.run({name: tensor.cpu().numpy() for name, tensor in named.items()})["outputs"]
        return torch.from_numpy(outputs).to(first_tensor(inputs).device)

    return Teacher(str(folder), answer, sha256(folder / DESCRIPTION))


@torch.no_grad()
def check_teacher_fits(teacher: Teacher, module: nn.Module, data: DataSplits, device: torch.device) -> None:
    """Check that a teacher takes the raw examples of its student, and has the same outputs.

    Args:
        teacher: the teacher.
        module: the student, on the CPU.
        data: two of its training examples are used.
        device: that of the teacher.

    Raises:
        ValueError: they do not fit.
    """
    inputs, _ = data.train.fetch(torch.arange(min(2, len(data.train))))
    key, other = f"task.teacher={teacher.folder}", "choose a teacher that was trained on such examples"
    try:
        answers = teacher(to_device(inputs, device))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{key} cannot take examples of shape {describe(inputs)}: {reason}\n  {other}") from error
    if not isinstance(answers, Tensor):
        raise ValueError(f"{key} gives {describe_outputs(answers)}, and a student learns from one tensor\n  {other}")
    try:
        outputs = call_model(module.eval(), inputs)
    except Exception:
        return  # `check_model_fits_data` says why
    finally:
        module.train()
    if isinstance(outputs, Tensor) and outputs.shape != answers.shape:
        theirs, ours = list(answers.shape[1:]), list(outputs.shape[1:])
        raise ValueError(
            f"{key} has outputs of shape {theirs}, and its student of shape {ours}: both need the same classes\n"
            f"  {other}"
        )
