"""The teacher of a distillation: the model of a finished run, with that run's transforms of evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoint.run_dir import RunDir
from trainer.config.saved_model import PARTS, load_model
from trainer.config.saved_transforms import load_transforms
from trainer.config.schema import Config
from trainer.config.targets import check_teacher_targets, find_targets
from trainer.data import DataSplits
from trainer.data.transforms import Compose
from trainer.loop.local_tensors import digest
from trainer.models.calling import call_model
from trainer.models.outputs import SelectOutput, describe_outputs
from trainer.utils.hardware import to_device
from trainer.utils.seeding import derive_seed
from trainer.utils.tensor_trees import Tree, describe, first_tensor


@dataclass(frozen=True)
class Teacher:
    """A trained model behind the transforms that its run evaluates it with: it takes raw inputs.

    Attributes:
        folder: of its run.
        module: in evaluation mode, on the device of the run that it teaches.
        transforms: of its own run.
        fingerprint: a hash of both.
    """

    folder: str
    module: nn.Module
    transforms: Compose
    fingerprint: str

    def __call__(self, inputs: Tree) -> Tensor:
        # The transforms take targets along, of which a teacher has none.
        transformed, _ = self.transforms.for_evaluation((inputs, torch.empty(0)), first_tensor(inputs).device)
        return call_model(self.module, transformed)


def load_teacher(config: Config, device: torch.device) -> Teacher | None:
    """Load the teacher that task.teacher= names; None if the task has none.

    Its classes are silotrain's, those of the user's configuration files, or of modules in the working directory.

    Raises:
        ValueError: the folder has no finished run, names other code, or is that of this run.
    """
    path = config.task.get("teacher")
    if path is None:
        return None
    folder = RunDir(Path(path).expanduser())
    try:
        return _load(folder, config, device)
    except ValueError as error:
        raise ValueError(f"task.teacher={path}: {error}") from error


def _load(folder: RunDir, config: Config, device: torch.device) -> Teacher:
    if folder.path.resolve() == Path(str(config.run_dir)).resolve():
        raise ValueError("that is the folder of this run\n  choose a finished run, or another run_dir")
    if not folder.config.is_file():
        raise ValueError("it is no run folder: it has no config.yaml\n  valid: the folder of a finished run")
    settings = folder.settings()
    parts = {name: settings[name] for name in (*PARTS, "transforms") if name in settings}
    check_teacher_targets(parts, folder.config)
    trust = [*find_targets(parts)]
    module = load_model(folder.path, config.task.get("teacher_weights", "best"), trust)
    if (output := settings["task"]["output"]) is not None:
        module.register_forward_hook(SelectOutput(output))
    transforms = load_transforms(folder.path, trust)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **transforms.state_dict()}
    fingerprint = f"{digest(tensors):016x}-{derive_seed(json.dumps(settings['transforms'])):016x}"
    return Teacher(str(folder.path), module.to(device).requires_grad_(False), transforms, fingerprint)


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
