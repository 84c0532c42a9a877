"""`--help` and `--cfg job`: keys, choices, and the configuration that overrides compose to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.cli.command import HERE, Shell
from trainer.commands import main as cli
from trainer.config.compose import compose_tree
from trainer.config.groups import CONF

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
STABLE_KEYS = """
silos clients batch_size micro_batch_size rounds round.epochs round.steps seed run_dir resume eval.every_rounds
launch.nproc_per_node
"""


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["--help"]) == 0
    return capsys.readouterr().out


def test_help_is_printed_and_nothing_is_started(shell: Shell, page: str) -> None:
    ended = shell.start("-m", "trainer", "-h", "rounds=1").end()
    assert (ended.code, ended.out, ended.err) == (0, page, "")
    assert not (shell.folder / "outputs").exists()


def test_help_fits_a_page(page: str) -> None:
    assert len(page.splitlines()) <= 120
    assert max(map(len, page.splitlines())) <= 125


@pytest.mark.parametrize("group", GROUPS)
def test_help_names_every_choice_of_a_group(group: str, page: str) -> None:
    lines = re.search(rf"^  {group}=((.*\n)( {{10,}}.*\n)*)", page, re.MULTILINE)
    assert lines and "".join(lines[1].split()).split(",") == sorted(path.stem for path in (CONF / group).glob("*"))


def test_help_explains_every_key_that_people_script_against(page: str) -> None:
    keys = yaml.safe_load(page.split("Keys:\n")[1])
    for key in STABLE_KEYS.split():
        section = keys
        for part in key.split("."):
            assert part in section, key
            section = section[part]


def test_help_names_the_commands_the_options_and_the_exit_codes(page: str) -> None:
    options = ("--help GROUP", "--cfg job", "--config FILE", "--config-dir DIR", "--quiet", "--log-level", "--version")
    usage = ("python -m trainer", "torchrun", "hydra.searchpath=", "-sc install=bash", "run.smoke=true")
    for promised in (*options, *usage, "0 finished", "1 failed", "2 bad", "75 preempted"):
        assert promised in page


def test_the_help_of_a_group_has_its_choices_and_the_keys_of_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help", "optimizer"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"^  adamw +Adam with", page, re.MULTILINE), page
    assert "Keys of optimizer=sgd:\n" in page and "\n  optimizer.lr=0.1" in page
    assert re.search(r"^  optimizer.lr_multipliers=\[\] +# factors on the learning rate", page, re.MULTILINE)


def test_the_help_of_a_choice_has_the_keys_that_it_takes_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help", "algorithm=trimmed_mean"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"algorithm.rule.trim=0.1 +# the fraction left out at each end", page)
    assert "\n  algorithm.weighting=equal" in page
    assert re.search(r"algorithm.shared_params=\.\* +# a regular expression", page), "explained in fedavg.yaml"
    assert cli.main(["--help", "transforms=crop"]) == 0
    assert "transforms.crop.padding=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topic", "error"),
    [("algoritm", "did you mean algorithm?"), ("algorithm=fedavgg", "did you mean fedavg?")],
)
def test_help_on_an_unknown_topic_lists_the_known_ones(
    topic: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--help", topic]) == 2
    message = capsys.readouterr()
    assert (
        message.err.startswith(f"--help {topic}: there is no such") and error in message.err and "valid:" in message.err
    )
    assert message.out == ""


def test_cfg_job_prints_the_configuration_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the resolved YAML of the tree that the same overrides compose to."""
    overrides = [*HERE, "algorithm=diloco", "silos=[1,1]", "data=text", "data.path=a b.txt", "run_dir=run"]
    assert cli.main(["--cfg", "job", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "${" not in printed and "???" not in printed
    assert yaml.safe_load(printed) == compose_tree(overrides)


def test_the_place_of_cfg_job_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rounds=3", "run_dir=run", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rounds"] == 3


def test_later_groups_choose_for_earlier_ones_and_the_user_for_all() -> None:
    text = compose_tree(["data=text", "data.path=a.txt", "data.length=32"])
    assert text["model"]["_target_"] == "trainer.models.GPT" and text["model"]["length"] == 32
    assert text["task"]["_target_"] == "trainer.tasks.LanguageModelling"
    diloco = compose_tree(["algorithm=diloco"])
    assert diloco["optimizer"]["_target_"] == "torch.optim.AdamW" and diloco["server"]["nesterov"] is True
    assert compose_tree(["algorithm=diloco", "optimizer=sgd"])["optimizer"]["_target_"] == "torch.optim.SGD"
    assert compose_tree(["data=mnist", "model=mlp"])["model"]["_target_"] == "trainer.models.MLP"


def test_the_run_folder_is_named_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert compose_tree(["algorithm=fedavg"])["run_dir"].startswith("outputs/digits-fedavg/")
    assert compose_tree(["name=mine"])["run_dir"].startswith("outputs/mine/")
    assert compose_tree(["experiment=mnist_fedavg"])["run_dir"].startswith("outputs/mnist_fedavg/")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert compose_tree([])["run_dir"] == "outputs/digits-sync/17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert compose_tree([])["run_dir"] == "outputs/digits-sync/20_3"


def test_runs_of_the_same_second_get_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        Path(compose_tree([])["run_dir"]).mkdir(parents=True)
