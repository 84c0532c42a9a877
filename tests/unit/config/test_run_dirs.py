"""The default run folder, and paths in a home directory."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from trainer.config import compose
from trainer.config.compose import compose_run, compose_tree


class SameSecond:
    """A clock that stands still."""

    @staticmethod
    def now() -> SameSecond:
        return SameSecond()

    def __format__(self, layout: str) -> str:
        return "2026-01-31_12-00-00"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compose, "datetime", SameSecond)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_runs_that_begin_in_the_same_second_have_two_folders() -> None:
    with compose_run(["seed=1"]) as first, compose_run(["seed=2"]) as second:
        assert first["run_dir"] == "outputs/digits-sync/2026-01-31_12-00-00"
        assert second["run_dir"] == "outputs/digits-sync/2026-01-31_12-00-00-2"
        assert all(Path(tree["run_dir"]).stat().st_mode & 0o777 == 0o700 for tree in (first, second))
        (Path(first["run_dir"]) / "config.yaml").touch()
    assert Path(first["run_dir"]).exists()
    assert not Path(second["run_dir"]).exists(), "nothing was put into it"


def test_a_folder_that_was_chosen_is_not_made(folder: Path) -> None:
    with compose_run(["run_dir=mine"]) as tree:
        assert tree["run_dir"] == "mine"
    (folder / "empty").mkdir()
    with compose_run(["run_dir=empty"]):
        pass
    assert [path.name for path in folder.iterdir()] == ["empty"]


def test_a_job_finds_the_folder_that_it_made_before_it_was_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(2):
        with compose_run([]) as tree:
            Path(tree["run_dir"]).mkdir(parents=True, exist_ok=True)
            assert tree["run_dir"] == "outputs/digits-sync/7"


def test_where_no_folder_can_be_made_the_key_is_named(folder: Path) -> None:
    (folder / "outputs").touch()
    with pytest.raises(ValueError, match=r"(?s)outputs/digits-sync/.* cannot be made: .*run_dir="), compose_run([]):
        pass


def test_looking_at_a_configuration_makes_no_folder(folder: Path) -> None:
    compose_tree([])
    assert not list(folder.iterdir())


def test_a_path_in_the_home_directory_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    tree = compose_tree(["run_dir='~/runs/a'", "resume='~/runs/b'"])
    assert (tree["run_dir"], tree["resume"]) == (f"{folder}/runs/a", f"{folder}/runs/b")


def test_without_a_home_directory_every_such_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry in its list."""

    def fail(user: int) -> NoReturn:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", fail)
    assert os.path.expanduser("~/a") == "~/a"
    compose_tree(["run_dir=a"])
    with pytest.raises(ValueError, match=r"data\.root=~/b\nrun_dir=~/a\n.*set HOME") as raised:
        compose_tree(["run_dir='~/a'", "data=mnist", "data.root='~/b'"])
    assert len(str(raised.value).splitlines()) == 3
