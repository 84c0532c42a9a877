"""Command line options besides Hydra's overrides, and the user's files and folders of configuration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cli.command import HERE, Shell
from trainer import __version__
from trainer.commands import main as cli
from trainer.commands.options import LOG_LEVEL, QUIET
from trainer.config.compose import compose_tree
from trainer.config.groups import SEARCH_PATH
from trainer.config.overrides import literal

VARIABLES = (QUIET, LOG_LEVEL, SEARCH_PATH)
FILE = """
rounds: 7
algorithm: fedprox
silos: [1, 1]
algorithm.proximal_mu: 0.2
optimizer: {lr: 0.5}
round:
  deadline_seconds: 1.0e+3
transforms: [crop, flip]
transforms.crop.padding: 1
name: 'a "quoted" \\ name, with $ {} []'
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the environment, in which options are stored."""
    with monkeypatch.context() as context:
        for name in VARIABLES:
            context.setenv(name, "")
            context.delenv(name)
        yield


def composed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Return the configuration of a command line."""
    code = cli.main(["--cfg", "job", "run_dir=run", *arguments])
    message = capsys.readouterr()
    assert (code, message.err) == (0, "")
    return yaml.safe_load(message.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error of a command line that is refused."""
    assert cli.main(["--cfg", "job", *arguments]) == 2
    message = capsys.readouterr()
    assert message.out == ""
    return message.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"silotrain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--log-level", "loud"], ["--log-level", "'loud'", "'debug', 'info', 'warning', 'error'"]),
        (["--log-level"], ["--log-level", "expected one argument"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--config-dir", "nowhere"], ["--config-dir nowhere: there is no such folder"]),
        (["-sc", "install=tcsh"], ["-sc install=tcsh", "valid: install=bash"]),
        (["--unheard"], ["--unheard is no override", "key=value"]),
        (["-m", "--cfg", "job", "seed=1,2"], ["--cfg", "cannot be combined with -m"]),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    message = capsys.readouterr()
    assert message.out == "" and not [part for part in parts if part not in message.err], message.err


# A file of keys


def test_the_keys_of_a_file_come_before_those_of_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(FILE)
    tree = composed(capsys, "rounds=8", "--config", str(tmp_path / "own.yaml"))
    overrides = ["rounds=8", "algorithm=fedprox", "silos=[1,1]", "algorithm.proximal_mu=0.2", "optimizer.lr=0.5"]
    overrides += ["round.deadline_seconds=1000.0", "transforms=[crop,flip]", "transforms.crop.padding=1"]
    name = {"name": 'a "quoted" \\ name, with $ {} []'}
    assert tree == compose_tree([*overrides, "run_dir=run"]) | name


def test_a_later_file_wins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nrounds: 2")
    (tmp_path / "b.yaml").write_text("seed: 3")
    tree = composed(capsys, "--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (tree["seed"], tree["rounds"]) == (3, 2)


@pytest.mark.parametrize(
    "overrides", [[], ["algorithm=krum", "silos=2", "clients=5", "data=text", "data.path=a b.txt"]]
)
def test_the_configuration_of_a_run_is_such_a_file(
    overrides: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Transforms with their arguments, and nested components, are included."""
    tree = compose_tree([*overrides, "transforms=[normalise]", "run_dir=run", "precision=bf16"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    again = composed(capsys, "--config", str(tmp_path / "config.yaml"))
    assert again == tree


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["own.yaml cannot be read", "No such file"]),
        ("a: [", ["own.yaml cannot be read"]),
        ("- a", ["own.yaml is no mapping", "valid:"]),
        ("rouds: 3", ["rouds is no key; did you mean rounds?"]),
        ("rounds: many", ["rounds=many", "valid: a whole number from 1"]),
        ("algorithm: fedavgg", ["algorithm=fedavgg", "did you mean fedavg?"]),
        ("round: {epoch: 3}", ["round.epoch is no key; did you mean round.epochs?"]),
    ],
)
def test_errors_in_a_file_are_those_of_overrides(
    text: str | None, parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    error = refused(capsys, "--config", str(tmp_path / "own.yaml"))
    assert not [part for part in parts if part not in error], error


@pytest.mark.parametrize(
    "value", ["", "a", '"', "\\", 'a\\"b\\\\"', "'", "7", "null", "a, b: {c}", "${oc.env:X}"[1:], "é\n"]
)
def test_literals_are_read_as_what_they_were(value: str) -> None:
    assert compose_tree([f"name={literal(value)}", "run_dir=run"])["name"] == (value or "digits-sync")
    arguments = {"a": [value, 1, 0.5, None, True], "b": {"c": value}}
    tree = compose_tree([f"++model.x={literal(arguments)}", "run_dir=run"])
    assert tree["model"]["x"] == arguments


# A folder of choices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model, and with a choice of algorithm that builds on a built-in one."""
    folder = tmp_path / "my configs"
    for group in ("model", "algorithm"):
        (folder / group).mkdir(parents=True)
    (folder / "model/mine.yaml").write_text("# A layer.\n_target_: torch.nn.Linear\nin_features: 64\n")
    (folder / "algorithm/strong.yaml").write_text("defaults:\n  - fedprox\n\nproximal_mu: 3.0\n")
    return folder


@pytest.mark.parametrize("option", ["--config-dir={}", "hydra.searchpath=['file://{}']"])
def test_choices_of_the_users_folder_are_choices(option: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = composed(capsys, option.format(folder), "model=mine", "algorithm=strong", "silos=2")
    assert tree["model"]["_target_"] == "torch.nn.Linear" and tree["model"]["in_features"] == 64
    assert tree["algorithm"]["proximal_mu"] == 3 and tree["algorithm"]["weighting"] == "examples"
    assert "mine" in refused(capsys, option.format(folder), "model=min")
    assert cli.main([option.format(folder), "--help"]) == 0
    assert ", mine, " in capsys.readouterr().out


def test_an_empty_search_path_has_none_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed(capsys, f"--config-dir={folder}", "model=mine")
    error = refused(capsys, "hydra.searchpath=[]", "model=mine")
    assert "model=mine: there is no such choice" in error and ", mine" not in error


# Shell completion


def completions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    assert cli.main(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


def test_keys_choices_and_values_are_completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["silotrain"])
    assert completions(capsys, monkeypatch, "silotrain round") == ["round.", "rounds="]
    assert "algorithm=fedavg" in completions(capsys, monkeypatch, "silotrain plan --quiet algorithm=fed")
    assert completions(capsys, monkeypatch, "silotrain algorithm=fedprox algorithm.prox") == ["algorithm.proximal_mu="]


def test_bash_takes_the_completion(shell: Shell) -> None:
    ended = shell.start("-m", "trainer", "--shell-completion", "install=bash").end()
    assert (ended.code, ended.err) == (0, "")
    asked = subprocess.run(["bash", "-c", f"{ended.out}\ncomplete -p silotrain"], capture_output=True, text=True)
    assert asked.stdout.endswith("-F hydra_bash_completion silotrain\n"), asked.stderr


# A run


def test_a_quiet_run_prints_nothing_and_logs_in_detail(shell: Shell) -> None:
    """The level is that of all loggers of the process. Without it, debugging messages are left out."""
    (shell.folder / "talks.py").write_text(
        "import logging, torch\n"
        "def net():\n"
        "    logging.getLogger('mine').debug('made a net')\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    own = ("model=custom", "model._target_=talks.net", "rounds=1", "run_dir=quiet")
    one_worker = ("launch.nproc_per_node=1", *HERE[1:])
    ended = shell.start("-m", "trainer", *one_worker, *own, "-q", "--log-level", "debug").end()
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (shell.folder / "quiet/result.json").exists()
    assert (shell.folder / "quiet/logs/rank-0.log").read_text().count("DEBUG mine: made a net") == 1
