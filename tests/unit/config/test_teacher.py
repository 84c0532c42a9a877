"""The teacher of task.teacher=: a finished run, its transforms and weights, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.cli.refusals import assert_says, building
from tests.support.exported import weights, write_linear
from trainer.checkpoint.format import write_tensors
from trainer.config.build import build, build_evaluation
from trainer.config.compose import compose_tree
from trainer.config.instantiate import instantiate
from trainer.config.schema import read_config
from trainer.config.teacher import load_teacher
from trainer.data.transforms import Standardise
from trainer.distributed.topology import Topology, distributed
from trainer.models import MLP, DigitsCNN
from trainer.service.version import ONNX
from trainer.tasks import Classification, Distillation

OWN = """
from torch import nn

class Wide(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, images):
        return {"logits": super().forward(images.flatten(1)), "images": images}
"""


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


def teacher_run(folder: Path, module: nn.Module, *overrides: str, name: str = "best") -> str:
    """Write the folder of a finished run; return its path."""
    folder.mkdir()
    tree = compose_tree([f"run_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "state.json").write_text('{"status": "finished"}\n')
    write_tensors(folder / f"{name}.safetensors", module.state_dict())
    return str(folder)


def student(topology: Topology, teacher: str, *overrides: str) -> Any:
    arguments = ["task=distillation", f"task.teacher={teacher}", "model.channels=4", *overrides]
    return build(read_config(compose_tree(arguments)), topology)


def raw_images() -> torch.Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_model_of_a_run_behind_its_transforms(topology: Topology, tmp_path: Path):
    """It takes raw inputs, by the statistics that its own run has measured; the student has others, and augments."""
    module = DigitsCNN().eval()
    folder = teacher_run(tmp_path / "teacher", module, "transforms=[flip,standardise]")
    write_tensors(
        tmp_path / "teacher/transforms.safetensors",
        {"standardise.mean": torch.tensor([0.25]), "standardise.std": torch.tensor([0.5])},
    )
    run = student(topology, folder, "transforms=[crop,standardise]", "transforms.crop.padding=1")
    assert isinstance(run.task, Distillation)
    assert run.task.teacher
    assert torch.equal(run.task.teacher(raw_images()), module((raw_images() - 0.25) / 0.5))
    ids = torch.arange(4)
    standardise = run.transforms.transforms["standardise"]
    assert isinstance(standardise, Standardise)
    standardise.mean, standardise.std = torch.tensor([3.0]), torch.tensor([7.0])
    inputs, (labels, seen) = run.transforms.for_training(run.data.train, ids, ids, 0, 0, topology.device)
    torch.testing.assert_close(inputs, (seen - 3.0) / 7.0)
    raw, expected = run.data.train.fetch(ids)
    assert torch.equal(labels, expected)
    assert not torch.equal(seen, raw)
    assert seen.min() >= 0


def test_one_output_of_a_model_of_ones_own(topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its class is in the working directory, as that of a run may be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_teacher.py").write_text(OWN)
    module = nn.Linear(64, 10)
    overrides = ("model=custom", "model._target_=own_teacher.Wide", "task.output=logits")
    run = student(topology, teacher_run(tmp_path / "teacher", module, *overrides))
    assert torch.equal(run.task.teacher(raw_images()), module(raw_images().flatten(1)))
    monkeypatch.chdir("/")
    said = refused(topology, str(tmp_path / "teacher"))
    assert_says(said, ["names own_teacher.Wide, which neither conf/ nor a module here has", "--config-dir"])


def test_an_exported_version(topology: Topology, tmp_path: Path):
    """Its graph has its transforms. A run of other inputs, or a damaged version, is refused."""
    folder = write_linear(tmp_path / "linear", 3)
    teacher = load_teacher(read_config(compose_tree(["task=distillation", f"task.teacher={folder}"])), topology.device)
    assert teacher
    inputs = torch.rand(5, 4)
    torch.testing.assert_close(teacher(inputs), inputs @ torch.from_numpy(weights(3)))
    other = write_linear(tmp_path / "linear", 4)
    assert_says(refused(topology, str(other)), ["cannot take examples of shape [1, 8, 8]"])
    (other / ONNX).write_bytes(b"another")
    assert_says(refused(topology, str(other)), [f"task.teacher={other}", "its checksum differs"])


def test_its_weights_and_transforms_are_its_fingerprint(topology: Topology, tmp_path: Path):
    module = DigitsCNN()
    found = {
        student(topology, teacher_run(tmp_path / name, module, *overrides)).task.fingerprint
        for name, overrides in {"one": (), "same": (), "other": ("transforms=[flip]",)}.items()
    }
    module.conv1.weight.data[0, 0, 0, 0] += 1e-6
    found.add(student(topology, teacher_run(tmp_path / "weights", module)).task.fingerprint)
    assert len(found) == 3


def refused(topology: Topology, teacher: str, *overrides: str) -> str:
    return building(["task=distillation", f"task.teacher={teacher}", *overrides], topology)


def test_what_is_no_teacher(topology: Topology, tmp_path: Path):
    """All at once, with what else is wrong."""
    said = refused(topology, str(tmp_path), "task.weight=2", "task.temperature=-1", "model.freeze=none")
    assert_says(
        said,
        [
            f"task.teacher={tmp_path}: it has neither a run's config.yaml nor a version's model.json",
            "task.weight=2",
            "task.temperature=-1",
        ],
    )
    assert_says(said, ["model.freeze=none"])
    last = teacher_run(tmp_path / "last", DigitsCNN(), name="model")
    assert_says(refused(topology, last), [f"task.teacher={last}", "has no best.safetensors", "valid: 'last'"])
    assert student(topology, last, "task.teacher_weights=last").task.teacher
    itself = teacher_run(tmp_path / "itself", DigitsCNN())
    assert_says(refused(topology, itself, f"run_dir={itself}"), ["that is the folder of this run"])


def test_a_teacher_that_does_not_fit(topology: Topology, tmp_path: Path):
    few = teacher_run(tmp_path / "few", DigitsCNN(classes=5), "model.classes=5")
    assert_says(refused(topology, few), ["has outputs of shape [5], and its student of shape [10]"])
    large = teacher_run(tmp_path / "large", MLP(), "model=mlp")
    assert_says(refused(topology, large), ["cannot take examples of shape [1, 8, 8]", "trained on such examples"])
    unmeasured = teacher_run(tmp_path / "unmeasured", DigitsCNN(), "transforms=[standardise]")
    assert_says(refused(topology, unmeasured), ["transforms.standardise: no 'mean'", "train it again"])


def test_a_task_without_a_teacher(topology: Topology, tmp_path: Path):
    folder = teacher_run(tmp_path / "teacher", DigitsCNN())
    message = building([f"+task.teacher={folder}", "+task.teacher_weights=best"], topology)
    assert_says(message, ["task=trainer.tasks.Classification learns from none"])


def test_evaluation_needs_no_teacher(topology: Topology):
    config = read_config(compose_tree(["task=distillation", "task.teacher=gone"]))
    run = build_evaluation(config, topology, None)
    outputs, labels = torch.randn(4, 10), torch.arange(4)
    for task in (run.task, instantiate("task", config.task)):
        assert torch.equal(task.score_sums(outputs, labels), Classification().score_sums(outputs, labels))
