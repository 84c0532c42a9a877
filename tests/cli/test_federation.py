"""The coordinator as a user types it, and simulated federations: their refusals, and a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.command import Shell, work
from tests.cli.refusals import assert_says
from trainer.commands import main as cli

COORDINATOR = [
    *("algorithm=fedavg", "data=npz", "model=mlp"),
    *("site.listen=localhost:7070", "site.members=[berlin,paris]", "site.certificates=certs"),
]
SITE = ["algorithm=fedavg", "site.name=berlin", "site.server=localhost:7070", "site.certificates=certs"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (COORDINATOR, {}, ["site.listen=localhost:7070", "python -m trainer coordinator algorithm=fedavg data=npz"]),
        (["coordinator", *SITE], {}, ["site.listen has no value", "set site.listen="]),
        (["coordinator", "-m", *COORDINATOR], {}, ["-m: ", "site.simulate="]),
        (["coordinator", *COORDINATOR], {"RANK": "0"}, ["one process", "without torchrun or srun"]),
        (["coordinator", *COORDINATOR, "site.min_members=3", "silos=2"], {}, ["site.min_members=3", "silos=2"]),
        (["-m", *COORDINATOR, "seed=1,2"], {}, ["site.listen=localhost:7070 with -m"]),
        (["exprot", "x"], {}, ["exprot is no command; did you mean export?", "valid: export, report", "coordinator"]),
        (["cordinator"], {}, ["did you mean coordinator?"]),
        (["--help", "sites"], {}, ["did you mean site?"]),
    ],
)
def test_refusals(
    arguments: list[str],
    environment: dict[str, str],
    message: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["trainer", *arguments])
    assert cli.main(arguments) == 2
    assert_says(capsys.readouterr().err, message)
    assert list(here.iterdir()) == []


def test_a_site_without_its_certificates_is_bad_input_on_all_ranks(ranks: Callable[[int], Any], here: Path) -> None:
    ranks(2).run(work, [*SITE, f"site.certificates={here / 'certs'}", f"run_dir={here / 'run'}"])
    assert json.loads((here / "run" / "state.json").read_text())["status"] == "bad_input"


def test_a_coordinator_prints_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coordinator", *COORDINATOR, "--cfg", "job"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["data"]["path"], tree["launch"]["nproc_per_node"]) == (None, 1)


def test_the_keys_of_sites_have_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help", "site"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = yaml.safe_load((Path(cli.__file__).parents[2] / "conf/config.yaml").read_text())["site"]
    assert [line.split("=")[0] for line in lines] == [f"site.{key}" for key in keys]
    assert all(" # " in line for line in lines)


@pytest.mark.long
def test_a_simulation_ends_as_a_run_and_continues_by_its_folder(shell: Shell) -> None:
    """Each launch has a run folder with the finished model; the coordinator's counts the examples of all sites."""
    options = ["launch.device=cpu", "rounds=1", "partition=dirichlet", "partition.alpha=1", "run_dir=run"]
    command = ("-m", "trainer", "algorithm=fedavg", "site.simulate=2", *options)
    ended = shell.start(*command).end()
    assert (ended.code, ended.err) == (0, "")
    assert "test/accuracy" in ended.out
    folders = [shell.folder / "run", *(shell.folder / f"run/sites/site-{site}" for site in range(2))]
    models = {(folder / "model.safetensors").read_bytes() for folder in folders}
    assert len(models) == 1
    state = json.loads((shell.folder / "run/state.json").read_text())
    assert state["status"] == "finished"
    again = shell.start("-m", "trainer", "run_dir=run").end()
    assert (again.code, again.err) == (0, "")
    assert "test/accuracy" in again.out
