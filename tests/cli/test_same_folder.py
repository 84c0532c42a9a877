"""The same run_dir again: a finished run is shown, an unfinished one is resumed, another one is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.command import HERE, Shell, work
from tests.cli.conftest import SYNC, Trained
from trainer.checkpoint.format import find_saved
from trainer.checkpoint.run_dir import RunDir
from trainer.commands import main as cli
from trainer.config.compose import compose_tree
from trainer.loggers import read_jsonl


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the modification time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def figures(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files with results of a run."""
    return {
        name: content
        for name, (content, _) in contents(folder).items()
        if not name.startswith("logs/") and name != "config.yaml"
    }


def weights(folder: Path, rounds: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the global model after this number of rounds, by dotted name."""

    def leaves(tree: dict, prefix: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in tree.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    saved = find_saved(folder / f"checkpoints/round-{rounds:06d}")
    assert saved is not None
    return leaves(saved.load("model"), "")


def test_a_finished_run_is_shown_and_not_run(new_shell: Callable[[], Shell], sync_run: Trained) -> None:
    before = figures(sync_run.folder)
    again = Shell(sync_run.folder.parent, new_shell().cache).train(*SYNC)
    assert (again.code, again.err) == (0, "")
    assert "round 1/2" not in again.out and "round 2/2" not in again.out
    summary = [line for line in again.out.splitlines() if line in sync_run.ended.out.splitlines()]
    assert any(line.startswith("test/accuracy") for line in summary)
    assert any(line.startswith("TensorBoard") for line in summary)
    assert figures(sync_run.folder) == before


@pytest.mark.long
def test_a_run_with_more_rounds_is_one_long_run(ranks, shell: Shell, sync_run: Trained) -> None:
    """The weights are the same bit for bit, and so are the losses and the chart; only the times differ."""
    ranks(2).run(work, ["rounds=1", "run_dir=sync"], str(shell.folder))
    folder = shell.folder / "sync"
    first_line = (folder / "metrics.jsonl").read_bytes()
    resumed = shell.train(*SYNC)
    assert (resumed.code, resumed.err) == (0, "")
    assert "round 2/2" in resumed.out and "round 1/2" not in resumed.out
    ours, theirs = weights(folder, 2), weights(sync_run.folder, 2)
    assert ours.keys() == theirs.keys() and len(ours) > 1
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (folder / "metrics.jsonl").read_bytes().startswith(first_line)
    reported = ("round", "examples", "steps", "train/loss", "test/loss", "test/accuracy", "validation/loss")
    pairs = zip(read_jsonl(folder / "metrics.jsonl"), read_jsonl(sync_run.folder / "metrics.jsonl"), strict=True)
    assert all([ours[key] for key in reported] == [theirs[key] for key in reported] for ours, theirs in pairs)
    assert yaml.safe_load((folder / "config.yaml").read_text())["rounds"] == 2


@pytest.mark.parametrize("algorithm", ["sync", "fedavg", "fedsgd", "diloco", "local"])
@pytest.mark.quick_rows(2)
def test_every_algorithm_goes_on_where_it_stopped(ranks, algorithm: str, tmp_path: Path) -> None:
    silos = 1 if algorithm == "sync" else 2
    overrides = [f"algorithm={algorithm}", f"silos={silos}", "clients=3", "round.steps=1"]
    for run_dir, rounds in (("long", 3), ("parts", 1), ("parts", 3)):
        ranks(2).run(work, [*overrides, f"rounds={rounds}", f"run_dir={tmp_path / run_dir}"])
    ours, theirs = weights(tmp_path / "parts", 3), weights(tmp_path / "long", 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reported = ("round", "examples", "train/loss", "test/loss")
    ours, theirs = (read_jsonl(tmp_path / run_dir / "metrics.jsonl") for run_dir in ("parts", "long"))
    assert [[metrics[key] for key in reported] for metrics in ours] == [
        [metrics[key] for key in reported] for metrics in theirs
    ]


def test_a_run_that_stopped_early_is_finished(ranks, tmp_path: Path) -> None:
    """It stops at a target that every model reaches; the same command, or one with more rounds, only shows it."""
    overrides = ["round.steps=1", "stop.metric_target=0", f"run_dir={tmp_path}"]
    ranks(2).run(work, ["rounds=5", *overrides])
    folder, before = RunDir(tmp_path), figures(tmp_path)
    assert folder.status() == "finished" and folder.has_finished(5)
    assert (folder.result()["round"], folder.result()["stopped"]) == (1, "target")
    for rounds in (5, 6):
        ranks(2).run(work, [f"rounds={rounds}", *overrides])
        assert figures(tmp_path) == before


def test_the_average_of_the_weights_is_exported(ranks, tmp_path: Path) -> None:
    """The exported model has the same names, and differs only in the averaged tensors."""
    overrides = ["rounds=2", "round.steps=2", "ema_decay=0.5", "model.norm=batch", "silos=1", f"run_dir={tmp_path}"]
    ranks(2).run(work, overrides)
    model, average = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "ema"))
    assert model.keys() == average.keys()
    same = {name for name in model if torch.equal(model[name], average[name])}
    assert same == {name for name in model if "running" in name or "num_batches" in name} != set()
    assert "ema/accuracy" in RunDir(tmp_path).result()


REFUSED = {
    "a key": (["batch_size=16"], ["batch_size=16", "32"]),
    "two keys": (["seed=7", "optimizer.lr=0.25"], ["seed=7", "has 0", "optimizer.lr=0.25", "has 0.1"]),
    "a group": (["algorithm=fedavg"], ["algorithm._target_=trainer.algorithms.FedAvg", "trainer.algorithms.Sync"]),
    "fewer rounds": (["rounds=1"], ["rounds=1", "has 2"]),
    "never resumed": (["resume=never"], ["resume=never"]),
}


@pytest.mark.parametrize(("overrides", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_another_run_is_refused(
    overrides: list[str], text: list[str], sync_run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the key, both values and a remedy; no file of the folder is changed."""
    before = contents(sync_run.folder)
    code = cli.main([*HERE, "rounds=2", f"run_dir={sync_run.folder}", *overrides])
    message = capsys.readouterr().err
    assert code == 2
    assert all(part in message for part in [*text, str(sync_run.folder), "another run_dir"])
    assert contents(sync_run.folder) == before


def test_what_does_not_change_the_figures_may_change(sync_run: Trained) -> None:
    """The devices, the processes and the logging of a run may change; the check raises nothing."""
    free = [
        "launch.nproc_per_node=4",
        "launch.threads_per_worker=2",
        "metrics.per_client=none",
        "checkpoint.keep_last=5",
        "name=other",
    ]
    RunDir(sync_run.folder).check(compose_tree([*SYNC, f"run_dir={sync_run.folder}", *free]))


def test_more_rounds_are_another_run_where_the_schedule_counts_them(tmp_path: Path) -> None:
    cosine = ["schedule=cosine", f"run_dir={tmp_path}"]
    folder = RunDir(tmp_path)
    folder.create_or_check(compose_tree(["rounds=1", *cosine]))
    with pytest.raises(ValueError, match="rounds=2, but the run in this folder has 1"):
        folder.check(compose_tree(["rounds=2", *cosine]))


OWN_SCHEDULES = """
def steady(progress):
    return 0.5

steady.is_constant = True

class Constant:
    def __call__(self, progress):
        return 1 - progress
"""


def test_a_schedule_states_itself_that_it_is_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its name: a schedule may be called Constant and count the rounds."""
    (tmp_path / "own_schedules.py").write_text(OWN_SCHEDULES)
    monkeypatch.syspath_prepend(tmp_path)

    def extend(schedule: str) -> None:
        """More rounds in the folder of a run of one."""
        folder, own = RunDir(tmp_path / schedule), ["schedule=custom", f"schedule._target_=own_schedules.{schedule}"]
        folder.create_or_check(compose_tree(["rounds=1", *own]))
        folder.check(compose_tree(["rounds=2", *own]))

    extend("steady")
    with pytest.raises(ValueError, match="rounds=2, but the run in this folder has 1"):
        extend("Constant")


TRACE = ["client_sampling=trace"]
SMALL_MLP = ["model=mlp", "model.inputs=3", "model.hidden=8", "model.classes=2", "batch_size=8"]


def write_points(path: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    np.savez(path, x=generator.normal(size=(40, 3)), y=np.arange(40) % 2)
    return path


def test_data_may_move_and_not_change(ranks, tmp_path: Path) -> None:
    """A run resumes with a copy of its file, is refused with another file, and when finished reads no file at all."""
    first, copy = (write_points(tmp_path / name, 0) for name in ("first.npz", "copy.npz"))
    other, run_dir = write_points(tmp_path / "other.npz", 1), tmp_path / "run"
    common = ["data=npz", *SMALL_MLP, f"run_dir={run_dir}"]
    ranks(1).run(work, [*common, f"data.path={first}", "rounds=1"])
    ranks(1).run(work, [*common, f"data.path={copy}", "rounds=2"])
    assert [metrics["round"] for metrics in read_jsonl(run_dir / "metrics.jsonl")] == [1, 2]
    ranks(1).run(work, [*common, f"data.path={other}", "rounds=3"])
    assert RunDir(run_dir).status() == "bad_input"
    assert [metrics["round"] for metrics in read_jsonl(run_dir / "metrics.jsonl")] == [1, 2]
    ranks(1).run(work, [*common, f"data.path={copy}", "rounds=3"])
    assert RunDir(run_dir).status() == "finished"
    with pytest.raises(ValueError, match=r"data\.path=.*other\.npz, but the run in this folder has .*copy\.npz"):
        RunDir(run_dir).check(compose_tree([*common, f"data.path={other}", "rounds=3"]))


@pytest.mark.parametrize(
    ("begun", "moved", "is_free"),
    [
        (["data=parquet", "data.path=a"], ["data=parquet", "data.path=b", "data.test_path=c"], True),
        (["data=npz", "data.files=[a,b]"], ["data=npz", "data.files=[c,d]"], True),
        (["data=npz", "data.files=[a]"], ["data=npz", "data.path=a"], True),
        (
            ["client_sampling=trace", "client_sampling.file=a"],
            ["client_sampling=trace", "client_sampling.file=b"],
            True,
        ),
        (["data=npz", "data.path=a"], ["data=npz", "data.path=a", "data.inputs=z"], False),
        (["data=npz", "data.path=a"], ["data=csv", "data.path=a"], False),
        (
            ["data=custom", "data._target_=my_module.load", "+data.path=a"],
            ["data=custom", "data._target_=my_module.load", "+data.path=b"],
            False,
        ),
    ],
)
def test_files_that_have_a_fingerprint_may_move(
    tmp_path: Path, begun: list[str], moved: list[str], is_free: bool
) -> None:
    """The files of a user's own reader may not: it may return a Dataset, whose examples are not compared."""
    folder = RunDir(tmp_path)
    folder.create_or_check(compose_tree([*begun, f"run_dir={tmp_path}"]))
    folder.set_status("preempted")
    if is_free:
        folder.check(compose_tree([*moved, f"run_dir={tmp_path}"]))
    else:
        with pytest.raises(ValueError, match="but the run in this folder has"):
            folder.check(compose_tree([*moved, f"run_dir={tmp_path}"]))


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert cli.main([*HERE, f"run_dir={tmp_path}"]) == 2
    assert f"run_dir={tmp_path}" in (text := capsys.readouterr().err) and "empty folder" in text
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_a_run_dir_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious")
    assert cli.main([*HERE, f"run_dir={tmp_path / 'file'}"]) == 2
    assert f"run_dir={tmp_path / 'file'}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file is in the way, which fails like a missing permission."""
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file/run"
    with pytest.raises(ValueError, match=re.escape(f"run_dir={run_dir}")):
        RunDir(run_dir).create_or_check(compose_tree([f"run_dir={run_dir}"]))


def test_a_configuration_that_was_damaged_is_refused(tmp_path: Path) -> None:
    folder, tree = RunDir(tmp_path), compose_tree([f"run_dir={tmp_path}"])
    folder.create_or_check(tree)
    (tmp_path / "config.yaml").write_text("seed: [0")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        folder.check(tree)


def test_a_checkpoint_that_was_damaged_is_bad_input(ranks, tmp_path: Path) -> None:
    """Every rank knows it before any of them trains."""
    overrides = ["round.steps=1", f"run_dir={tmp_path}"]
    ranks(2).run(work, ["rounds=1", *overrides])
    part = tmp_path / "checkpoints/round-000001/silo-0.replica-0.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    ranks(2).run(work, ["rounds=2", *overrides])
    assert RunDir(tmp_path).status() == "bad_input"
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1


def test_a_run_of_bad_input_is_mended_in_its_folder(tmp_path: Path) -> None:
    """Nothing was trained in it, so other values are allowed."""
    folder = RunDir(tmp_path)
    folder.create_or_check(compose_tree(["data=mnist", "data.root=nowhere", f"run_dir={tmp_path}"]))
    folder.set_status("bad_input")
    folder.check(compose_tree(["data=mnist", "data.root=somewhere", "seed=1", f"run_dir={tmp_path}"]))
