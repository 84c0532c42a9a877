"""An exported run answers as its model does, with its figures, from raw inputs; nothing of its machine is in it."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.cli.command import work
from tests.laws.test_evaluate import figures
from tests.support.pool import RankPool
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.export import main as follower
from trainer.commands.main import main
from trainer.config.saved_model import load_model
from trainer.config.saved_transforms import load_transforms
from trainer.data import digits
from trainer.service.engine import load_engine
from trainer.service.version import ModelDescription, read_version, version_numbers

Ranks = Callable[[int], RankPool]

SHORT = 5  # letters: such a name may occur among the bytes of weights by chance
SMALL = ("model.channels=4", "model.hidden=8", "launch.threads_per_worker=1")
RUNS = {
    "sync": ["rounds=2", "ema_decay=0.9", "transforms=[standardise,flip]", *SMALL],
    "fedavg": ["rounds=3", "algorithm=fedavg", "silos=2", "clients=4", "metrics.per_client=none", *SMALL],
}


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("unmistakable") / name
            ranks(2).run(work, [*RUNS[name], f"run_dir={made[name]}"])
        return made[name]

    return train


def export(run: Path, models: Path, *options: str) -> tuple[Path, ModelDescription]:
    assert main(["export", str(run), "--to", str(models), "--name", "digits", *options]) == 0
    folder = models / "digits" / str(version_numbers(models / "digits")[-1])
    return folder, read_version(folder)


def answers(folder: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    return load_engine(folder, read_version(folder)).run({"inputs": inputs})


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    return digits().test.fetch(torch.arange(len(digits().test)))


@pytest.mark.parametrize("name", RUNS)
def test_its_accuracy_is_that_of_the_run_to_the_last_digit(
    ranks: Ranks, trained: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    run = trained(name)
    folder, description = export(run, tmp_path, "--weights", "last")
    result = json.loads((run / "result.json").read_text())
    inputs, targets = examples()
    found = answers(folder, inputs.numpy())
    assert (found["label"] == targets.numpy()).mean() == result["test/accuracy"] == description.metrics["test/accuracy"]
    raw, _ = load_transforms(run).for_evaluation((inputs, targets), torch.device("cpu"))
    outputs = load_model(run)(raw).detach()
    np.testing.assert_allclose(found["outputs"], outputs, atol=1e-5)
    np.testing.assert_allclose(found["scores"], outputs.softmax(1), atol=1e-6)
    for evaluated in ranks(2).run(figures, str(folder), "last", [], 1):
        assert evaluated.metrics["test/accuracy"] == result["test/accuracy"]


def test_weights_have_the_figures_of_their_round(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained("sync")
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, averaged = export(run, tmp_path, "--weights", "ema")
    assert averaged.metrics["test/accuracy"] == rounds[-1]["ema/accuracy"]
    _, best = export(run, tmp_path)
    values = [line["validation/accuracy"] for line in rounds]
    assert best.headline == "validation/accuracy" and best.metrics["validation/accuracy"] == max(values)
    folder, of_file = export(run, tmp_path, "--weights", str(run / "best.safetensors"))
    assert of_file.metrics == {} and of_file.headline == "" and folder.name == "3"
    assert (folder / "model.onnx").read_bytes() == (folder.parent / "2" / "model.onnx").read_bytes()


def test_nothing_of_this_machine_is_in_it(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained("fedavg")
    export(run, tmp_path / "out", "--quantise", "int8", "--tolerance", "1")
    folder, description = export(run, tmp_path / "out", "--format", "onnx,pt2")
    words = ["unmistakable", str(Path.cwd()), socket.gethostname(), getpass.getuser(), "client/", str(tmp_path)]
    words = [word for word in words if len(word) > SHORT]
    for path in [*folder.parent.rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        assert not [word for word in words if word.encode() in content], path
    assert description.provenance["run"] == "fedavg" and description.provenance["seed"] == 0
    settings: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["algorithm"] and not {"run_dir", "launch"} & settings.keys()


def test_a_follower_exports_each_best_round_of_a_run(ranks: Ranks, tmp_path: Path) -> None:
    """Versions appear while the run trains, their headline rises, and the follower ends with the run."""
    run, models = tmp_path / "run", tmp_path / "models"
    seen: list[float] = []
    following = threading.Thread(
        target=lambda: seen.append(main(["export", str(run), "--to", str(models), "--name", "digits", "--follow"]))
    )
    overrides = ["rounds=6", "algorithm=fedavg", "silos=2", "clients=4", *SMALL, f"run_dir={run}"]
    ranks(2).run(work, [*overrides, "rounds=1"])
    following.start()
    ranks(2).run(work, overrides)
    following.join(60)
    assert seen == [0]
    numbers = version_numbers(models / "digits")
    described = [read_version(models / "digits" / str(number)) for number in numbers]
    headlines = [description.metrics["validation/accuracy"] for description in described]
    assert 1 <= len(numbers) <= follower.KEPT_BY_FOLLOWER and headlines == sorted(headlines)
    result = json.loads((run / "result.json").read_text())
    assert headlines[-1] == result["best_value"] and described[-1].provenance["round"] == result["best_round"]
    assert main(["export", str(run), "--to", str(models), "--name", "digits", "--follow"]) == 0
    assert version_numbers(models / "digits") == numbers, "a follower that comes later finds nothing new"
    best = load_model(run, "best")(examples()[0]).detach()
    found = answers(models / "digits" / str(numbers[-1]), examples()[0].numpy())
    np.testing.assert_allclose(found["outputs"], best, atol=1e-5)


def test_a_follower_of_a_crashed_run_gives_up_in_the_end(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has exported the best round until then. Nobody restarts the run in the time that a launcher takes."""
    run = shutil.copytree(trained("fedavg"), tmp_path / "run")
    RunDir(run).set_status("crashed")
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(follower, "RESTART_SECONDS", 0.03)
    assert main(["export", str(run), "--to", str(tmp_path / "models"), "--name", "digits", "--follow"]) == 1
    assert "the run has crashed: waits until it continues" in capsys.readouterr().err
    assert version_numbers(tmp_path / "models/digits") == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "nothing.safetensors"], "nothing.safetensors is not a file"),
        (["--format", "tflite"], "got tflite, valid: onnx or pt2"),
        (["--format", "huggingface,onnx"], "the model is not of transformers"),
        (["--format", "pt2", "--quantise", "int8"], "add onnx to --format"),
        (["--follow", "--weights", "best"], "--follow exports the best round"),
        (["--keep", "0"], "got 0, valid: a whole number from 1"),
        (["--name", "../x"], "--name ../x\n  valid: letters, digits"),
        (["--quantise", "int8", "--tolerance", "-1"], "more than --tolerance -1 allows: nothing was exported"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    trained: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["export", str(trained("fedavg")), "--to", str(tmp_path / "models"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path)]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err
