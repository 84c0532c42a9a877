"""Plans of sweeps: jobs, objective and overrides, and all errors before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.checkpoint.run_dir import RunDir
from trainer.commands import main as cli
from trainer.commands.sweep import hydra_plugins
from trainer.commands.sweep.job import assign
from trainer.commands.sweep.sweep_plan import make_plan
from trainer.config.compose import compose_tree
from trainer.distributed.launch import subprocesses

BATCH = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, outside SLURM."""
    for name in BATCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments: str) -> list[str]:
    jobs = make_plan([*arguments, "run_dir=sweep"]).jobs
    assert jobs is not None and {job.sweep for job in jobs} == {Path("sweep")}
    return [job.name for job in jobs]


def test_a_job_for_each_combination() -> None:
    found = names("optimizer.lr=0.1,0.03", "algorithm=sync,fedavg", "rounds=1")
    lists = (("0.1", "sync"), ("0.1", "fedavg"), ("0.03", "sync"), ("0.03", "fedavg"))
    assert found == [f"optimizer.lr={rate},algorithm={name}" for rate, name in lists]


def test_the_parts_of_a_sweep_are_all_of_it() -> None:
    parts = [names("seed=1,2,3", f"hydra.launcher.part=[{index},2]") for index in range(2)]
    assert parts == [["seed=1", "seed=3"], ["seed=2"]]


def test_a_sweep_has_a_folder_of_its_own() -> None:
    assert str(make_plan(["seed=1,2"]).folder).startswith("outputs/digits-sync/sweep-2")
    assert make_plan(["algorithm=sync,fedavg"]).folder.parent == Path("outputs/digits")
    assert make_plan(["name=a,b"]).folder.parent == Path("outputs/several")


def test_under_slurm_the_folder_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs of an array share it, and a requeued one finds it again."""
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert make_plan(["seed=1,2"]).folder == Path("outputs/digits-sync/sweep-71")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert make_plan(["seed=1,2"]).folder == Path("outputs/digits-sync/sweep-70")


def test_the_objective_is_the_tasks_own() -> None:
    """It is a metric of the validation set, since the test set must select nothing."""
    assert make_plan(["seed=1,2"]).objective == "validation/accuracy"
    assert make_plan(["seed=1,2", "data.validation=0"]).objective == "test/accuracy"
    assert make_plan(["data=text", "data.path=a.txt", "seed=1,2"]).objective == "validation/perplexity"
    assert make_plan(["seed=1,2", "objective=test/loss"]).objective == "test/loss"


def test_optuna_gets_the_direction_of_the_objective() -> None:
    """Overrides of the user come later, and win."""
    chosen = make_plan(["hydra/sweeper=optuna", "optimizer.lr=interval(0.01,0.3)", "objective=test/loss"])
    assert chosen.jobs is None
    assert "hydra.sweeper.direction=minimize" in chosen.overrides and "hydra.sweeper.sampler.seed=0" in chosen.overrides
    arguments = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.direction=minimize", "seed=1,2"]
    overrides = make_plan(arguments).overrides
    assert not any("sampler.seed" in override for override in overrides)
    assert overrides.index("hydra.sweeper.direction=maximize") < overrides.index("hydra.sweeper.direction=minimize")


ERRORS = [
    (["batchsize=1", "seed=1,x", "model=mlp,lp", "rounds=0,1"], ["batchsize", "model=lp", "mlp"]),
    (["seed=1,x", "rounds=0,1"], ["seed=x", "rounds=0"]),
    (["optimizer=sgd,adam", "optimizer.betas=[0.9,0.9]"], ["optimizer.betas"]),
    (["optimizer=adam,sgd", "clip.max_norm=1,2", "optimizer.betas=[0.9,0.99]"], ["optimizer.betas"]),
    (["run_dir=a,b"], ["run_dir=a,b", "a single value"]),
    (["objective=test/accurracy", "seed=1,2"], ["objective=test/accurracy", "did you mean test/accuracy?"]),
    (["task=custom", "task._target_=own.Task", "seed=1,2"], ["objective=null", "own.Task"]),
    (["hydra.launcher.jobs=0"], ["hydra.launcher.jobs=0", "whole number from 1"]),
    (["hydra.launcher.part=[2,2]", "hydra.launcher.jobs=x"], ["hydra.launcher.part=[2, 2]", "hydra.launcher.jobs=x"]),
    (["hydra.launcher.part=[0,2]", "hydra/sweeper=optuna"], ["hydra.launcher.part", "chooses its jobs itself"]),
    (["hydra.launcher.job=2"], ["hydra.launcher.job is not a key; did you mean hydra.launcher.jobs?"]),
    (["hydra/launcher=lokal"], ["hydra/launcher/lokal", "local"]),
    (["--cfg", "job"], ["--cfg and --help cannot be combined with -m", "leave -m out"]),
    (["seed=1,2", "name=a=b"], ["name=a=b"]),
    (
        ["seed=1,2", "algorithm=fedavg", "site.name=a", "site.server=h:1", "site.certificates=c"],
        ["site.name=a with -m", "site.simulate="],
    ),
]


@pytest.mark.parametrize(("arguments", "texts"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
@pytest.mark.quick_rows(6)
def test_bad_input_is_refused_before_anything_starts(
    arguments: list[str], texts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["-m", *arguments]) == 2
    printed = capsys.readouterr()
    assert all(text in printed.err for text in texts), printed.err
    assert "Traceback" not in printed.err and not list(here.iterdir())


def test_an_error_of_all_jobs_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["seed=1,2,3", "-m", "rounds=0", "optimizer.lr=0.1,0.2"]) == 2
    assert capsys.readouterr().err == "rounds=0\n  valid: a whole number from 1\n"


def test_a_job_does_not_resume_another_run(here: Path) -> None:
    """The folder of the second job has a run with another batch size."""
    folder = here / "sweep/seed=2"
    tree = compose_tree(["seed=2", "batch_size=16", assign("run_dir", str(folder))])
    RunDir(folder).create_or_check(tree)
    RunDir(folder).set_status("preempted")
    with pytest.raises(ValueError, match="batch_size=32, but the run in this folder has 16"):
        names("seed=1,2")
    assert names("seed=1,2", "batch_size=16") == ["seed=1", "seed=2"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_plugins, "find_spec", lambda name: None)
    for choice in hydra_plugins.PACKAGES:
        with pytest.raises(ValueError, match=f"{choice} needs a package .*\n  pip install 'silotrain\\[sweep\\]'"):
            make_plan([choice, "seed=1,2"])


def test_more_jobs_at_a_time_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocesses, "count_gpus", lambda: 2)
    with pytest.raises(ValueError, match=r"hydra\.launcher\.jobs=3 with 2 visible GPUs"):
        names("seed=1,2", "hydra.launcher.jobs=3")
    assert names("seed=1,2", "hydra.launcher.jobs=3", "launch.device=cpu") == ["seed=1", "seed=2"]


def test_hydras_keys_are_for_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hydra.launcher.jobs=2"]) == 2
    assert "python -m trainer -m" in capsys.readouterr().err


def test_a_worker_cannot_start_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["-m", "seed=1,2"]) == 2
    assert "start it without torchrun or srun" in capsys.readouterr().err
