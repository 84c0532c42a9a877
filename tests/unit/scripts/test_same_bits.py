"""Comparing tables: equal ones pass, each different value is named; every choice has a configuration."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

from scripts import same_bits
from scripts.same_bits import CONFIGURATIONS, Runs, differences

CONF = Path(__file__).parents[3] / "conf"
OLD: Runs = {
    "fedavg": {
        "sha256": {"model.safetensors": "ab12"},
        "numbers": {"train/gradient_norm": 0.5, "test/accuracy": 0.9, "stopped_loss": None},
    },
    "sync": {"sha256": {"model.safetensors": "cd34"}, "numbers": {"round": 2}},
}


@pytest.fixture
def new() -> Runs:
    return copy.deepcopy(OLD)


class TestDifferences:
    def test_equal_tables_have_none(self, new: Runs):
        assert differences(OLD, new, OLD, {}) == {}

    def test_a_hash(self, new: Runs):
        new["sync"]["sha256"]["model.safetensors"] = "cd35"
        assert differences(OLD, new, OLD, {}) == {"sync": ["model.safetensors: cd34 -> cd35"]}

    def test_a_number_to_its_last_bit(self, new: Runs):
        new["fedavg"]["numbers"]["test/accuracy"] = 0.9000000000000001
        assert differences(OLD, new, OLD, {}) == {"fedavg": ["test/accuracy: 0.9 -> 0.9000000000000001"]}

    def test_a_renamed_metric_is_compared_by_its_value(self, new: Runs):
        numbers = new["fedavg"]["numbers"]
        numbers["train/grad_norm"] = numbers.pop("train/gradient_norm")
        renamed = {"train/gradient_norm": "train/grad_norm"}
        assert differences(OLD, new, OLD, renamed) == {}
        assert differences(OLD, new, OLD, {}) == {"fedavg": ["train/gradient_norm: 0.5 -> missing"]}
        numbers["train/grad_norm"] = 0.25
        assert differences(OLD, new, OLD, renamed) == {"fedavg": ["train/grad_norm: 0.5 -> 0.25"]}

    def test_a_metric_or_a_file_that_is_new_is_no_difference(self, new: Runs):
        new["fedavg"]["numbers"]["test/recall"] = 0.8
        new["sync"]["sha256"]["best.safetensors"] = "ef56"
        assert differences(OLD, new, OLD, {}) == {}

    def test_a_number_that_became_none(self, new: Runs):
        new["fedavg"]["numbers"]["test/accuracy"] = None
        del new["fedavg"]["numbers"]["stopped_loss"]
        assert differences(OLD, new, OLD, {}) == {
            "fedavg": ["test/accuracy: 0.9 -> None", "stopped_loss: None -> missing"]
        }

    def test_a_run_that_is_missing(self, new: Runs):
        del new["sync"]
        assert differences(OLD, new, OLD, {}) == {"sync": ["missing in the new table"]}
        assert differences(OLD, new, ["fedavg"], {}) == {}


class TestCommand:
    @pytest.fixture
    def tables(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: Runs) -> Path:
        """Return a new table that differs in one hash, and the command that compares it with the old one."""
        new["sync"]["sha256"]["model.safetensors"] = "cd35"
        for name, runs in (("old.json", OLD), ("new.json", new)):
            (tmp_path / name).write_text(json.dumps({"machine": "here", "runs": runs}))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_a_difference_is_printed_and_the_exit_code_is_1(self, tables: Path, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["same_bits", "new.json", "--compare", "old.json", "--reuse"])
        assert same_bits.main() == 1
        assert capsys.readouterr().out == "sync differs:\n  model.safetensors: cd34 -> cd35\n1 of 2 equal\n"

    def test_equal_ones_are_counted(self, tables: Path, monkeypatch, capsys):
        arguments = ["same_bits", "new.json", "--compare", "old.json", "--reuse", "--only", "fedavg"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert same_bits.main() == 0
        assert capsys.readouterr().out == "1 of 1 equal\n"


@pytest.mark.parametrize("group", ["algorithm", "update_compression", "gradient_compression"])
def test_every_choice_of_a_group_has_a_configuration(group: str):
    """A new file of conf/ needs a new row, except the default fp32 and custom choices."""
    overrides = {override for configuration in CONFIGURATIONS.values() for override in configuration.overrides}
    choices = {f"{group}={path.stem}" for path in (CONF / group).glob("*.yaml")}
    assert choices - overrides <= {f"{group}=fp32", f"{group}=custom"}
