"""`run_dir=` alone takes the configuration that is saved in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.commands.options import expand_config_options
from trainer.config.compose import compose_tree
from trainer.config.saved import reading_overrides


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with a module of a user."""
    (tmp_path / "my_net.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def started(*overrides: str) -> Path:
    """Return the folder of a run with these overrides that was begun."""
    folder = RunDir(Path("a run"))
    folder.create_or_check(compose_tree([*overrides, f"run_dir='{folder.path}'"]))
    folder.lock.release()
    folder.set_status("preempted")
    return folder.path


OWN = ("model=custom", "model._target_=my_net.Net", "+model.width=3", "rounds=7", "algorithm=krum", "silos=2")


def test_alone_it_is_the_configuration_of_the_run(here: Path) -> None:
    folder = started(*OWN, "transforms=[crop,flip]", "checkpoint.keep_last=5")
    again = expand_config_options(["-q", f"run_dir='{folder}'"])
    tree = compose_tree([override for override in again if override != "-q"])
    assert tree == yaml.safe_load((folder / "config.yaml").read_text())
    RunDir(folder).check(tree)


@pytest.mark.parametrize("beside", [["rounds=7"], ["-m"], ["--config", "own.yaml"]])
def test_with_other_arguments_they_count_alone(here: Path, beside: list[str]) -> None:
    Path("own.yaml").write_text("seed: 3")
    folder = started(*OWN)
    assert not [given for given in expand_config_options([*beside, f"run_dir={folder}"]) if "my_net" in given]


def test_a_run_that_had_to_be_new_is_continued(here: Path) -> None:
    folder = started("resume=never")
    assert compose_tree(expand_config_options([f"run_dir='{folder}'"]))["resume"] == "auto"


@pytest.mark.parametrize("status", [None, "bad_input"])
def test_without_a_run_there_the_arguments_are_all(here: Path, status: str | None) -> None:
    if status:
        RunDir(started(*OWN)).set_status("bad_input")
    assert expand_config_options(["run_dir='a run'"]) == ["run_dir='a run'"]


@pytest.mark.parametrize("target", ["my_package.Net", "os.getcwd", "trainer.checkpoint.files.write_text"])
def test_what_is_neither_in_conf_nor_in_the_working_directory_is_not_called(here: Path, target: str) -> None:
    folder = started("model=custom", f"model._target_={target}")
    with pytest.raises(ValueError, match="which neither conf/ nor") as refusal:
        expand_config_options([f"run_dir='{folder}'"])
    assert target in str(refusal.value) and f"--config {folder}/config.yaml" in str(refusal.value)
    named = expand_config_options(["--config", f"{folder}/config.yaml", f"run_dir='{folder}'"])
    assert compose_tree(named)["model"]["_target_"] == target


def test_references_are_refused(here: Path) -> None:
    folder = started()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**saved, "name": "${oc.env:HOME}"}))
    with pytest.raises(ValueError, match="has references"):
        expand_config_options([f"run_dir='{folder}'"])


def test_commands_that_read_a_run_take_its_configuration_with_other_keys(here: Path) -> None:
    """Of a group with another choice nothing is left, nor of the run's start. A wrong key alone is an error."""
    folder = started("optimizer=adamw", "optimizer.lr=0.5", "launch.nodes=2", "launch.rdzv_endpoint=a:1", "rounds=3")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    tree = compose_tree(reading_overrides(folder / "config.yaml", ["data=npz", "data.path=a.npz", "batch_size=7"]))
    assert tree["data"] == compose_tree(["data=npz", "data.path=a.npz"])["data"]
    assert (tree["batch_size"], tree["rounds"], tree["optimizer"]) == (7, 3, saved["optimizer"])
    assert tree["launch"]["nodes"] == 1 and tree["run_dir"] != saved["run_dir"]
    with pytest.raises(ValueError, match=r"^bach_size is no key; did you mean batch_size") as error:
        compose_tree(reading_overrides(folder / "config.yaml", ["bach_size=7"]))
    assert "~" not in str(error.value)
