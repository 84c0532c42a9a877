"""The transforms of a run folder: those of its training, bit for bit, without its data; and nothing foreign is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.config.saved_transforms import load_transforms

STANDARDISE = {"standardise": {"_target_": "trainer.data.transforms.Standardise", "key": None}}
FLIP = {"flip": {"_target_": "trainer.data.transforms.RandomFlip", "key": None}}
CPU = torch.device("cpu")


def write_run(folder: Path, transforms: dict[str, Any], statistics: dict[str, torch.Tensor]) -> Path:
    (folder / "config.yaml").write_text(yaml.safe_dump({"transforms": transforms, "channels_last": False}))
    if statistics:
        RunDir(folder).write_transforms(statistics)
    return folder


def test_they_have_the_statistics_of_the_file_bit_for_bit(tmp_path: Path) -> None:
    mean, std = torch.rand(3, dtype=torch.float64) / 3, torch.rand(3, dtype=torch.float64) + 1e-9
    folder = write_run(tmp_path, STANDARDISE | FLIP, {"standardise.mean": mean, "standardise.std": std})
    transforms = load_transforms(folder)
    assert not transforms.needs_fitting
    images, targets = torch.rand(5, 3, 4, 4), torch.arange(5)
    expected = (images - mean.float().view(3, 1, 1)) / std.float().view(3, 1, 1)
    assert torch.equal(transforms.for_evaluation((images, targets), CPU)[0], expected)
    state = transforms.state_dict()
    assert torch.equal(state["standardise.mean"], mean) and torch.equal(state["standardise.std"], std)


@pytest.mark.parametrize(
    ("transforms", "statistics", "message"),
    [
        (STANDARDISE, {}, r"transforms\.standardise: no 'mean' .*\n  its run has not begun to train"),
        ({"own": {"_target_": "os.system", "command": "touch hit"}}, {}, "names os.system.*nothing was imported"),
    ],
)
def test_what_cannot_be_had_is_refused(
    tmp_path: Path, transforms: dict[str, Any], statistics: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_transforms(write_run(tmp_path, transforms, statistics))


def test_a_damaged_file_and_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        load_transforms(tmp_path)
    (write_run(tmp_path, STANDARDISE, {}) / "transforms.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"transforms\.safetensors cannot be read"):
        load_transforms(tmp_path)
