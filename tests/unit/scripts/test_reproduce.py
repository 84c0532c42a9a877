"""Reproduced tables: rounds to a target, the list of runs, their execution, and the output."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.reproduce import __main__ as evidence
from scripts.reproduce import diloco, distillation, fashion, mcmahan, scaffold, series
from scripts.reproduce.alone import accuracy_on_all
from scripts.reproduce.curves import curve, final, rounds_to_target
from scripts.reproduce.markdown import rounds_of, spread, table
from scripts.reproduce.series import Runner
from scripts.reproduce.trials import Series, Trial
from tests.cli.command import work
from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree

EVERY_TRIAL = [trial for module in evidence.TABLES.values() for trial in module.trials((0, 1))]


def write_rounds(folder: Path, accuracies: list[float], status: str = "preempted", **facts: object) -> None:
    """Write a run folder with a round for each accuracy."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"round": i, "test/accuracy": value}) for i, value in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    RunDir(folder).set_status(status, **facts)  # pyright: ignore[reportArgumentType]


class TestRoundsToTarget:
    def test_the_curve_is_made_monotone_and_interpolated(self):
        """By hand: the best so far is .5 .9 .9 .95, and .925 is half way from the third round to the fourth."""
        values = np.array([0.5, 0.9, 0.7, 0.95])
        assert rounds_to_target(np.arange(1, 5), values, 0.925) == pytest.approx(3.5)
        assert rounds_to_target(np.arange(1, 5), values, 0.9) == pytest.approx(2)
        assert rounds_to_target(np.array([5, 10, 15, 20]), values, 0.7) == pytest.approx(7.5)

    def test_at_the_ends(self):
        values = np.array([0.5, 0.9])
        assert rounds_to_target(np.array([1, 2]), values, 0.3) == 1
        assert rounds_to_target(np.array([1, 2]), values, 0.91) is None
        assert rounds_to_target(np.array([]), np.array([]), 0.5) is None
        assert rounds_to_target(np.array([1, 2]), np.array([math.nan, 0.9]), 0.5) == 2

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
    def test_no_round_before_it_is_there_and_the_one_after_it_is(self, accuracies: list[float], target: float):
        values = np.array(accuracies)
        found = rounds_to_target(np.arange(1, len(values) + 1), values, target)
        first = next((i for i, value in enumerate(accuracies, 1) if value >= target), None)
        assert (found is None) == (first is None)
        if found is not None and first is not None:
            assert max(first - 1, 1) <= found <= first


class TestCurves:
    def test_rounds_without_an_evaluation_are_passed_over(self, tmp_path: Path):
        lines = [{"round": 1}, {"round": 2, "test/accuracy": 0.5}, {"round": 3}, {"round": 4, "test/accuracy": None}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rounds, values = curve(tmp_path)
        assert rounds.tolist() == [2, 4] and values[0] == 0.5 and np.isnan(values[1])

    def test_the_end_is_the_mean_of_the_last_rounds(self, tmp_path: Path):
        write_rounds(tmp_path / "run", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
        assert final(tmp_path / "run", "test/accuracy") == pytest.approx(0.3)
        assert math.isnan(final(tmp_path / "none", "test/accuracy"))


def rivals(folder: Path, *rates: float, target: float | None = 0.9) -> Series:
    """Return the trials of a cell with these learning rates."""
    return Series([Trial("cell", lr, 0, (), target) for lr in rates], folder)


class TestSeries:
    def test_what_cannot_be_first_any_more_is_over(self, tmp_path: Path):
        both = rivals(tmp_path, 0.1, 0.2)
        one, other = both.trials
        write_rounds(both.of(one), [0.5, 0.7, 0.95], "running")
        write_rounds(both.of(other), [0.5, 0.6], "running")
        assert both.is_over(one) and both.best("cell", 0) == one
        assert not both.is_over(other)  # it may still reach the target in round 3
        write_rounds(tmp_path / "more" / other.name, [0.5, 0.6, 0.7], "running")
        write_rounds(tmp_path / "more" / one.name, [0.5, 0.7, 0.95], "running")
        assert Series(both.trials, tmp_path / "more").is_over(other)

    def test_what_diverged_is_over_and_what_crashed_is_not(self, tmp_path: Path):
        both = rivals(tmp_path, 0.1, 0.2)
        write_rounds(both.of(both.trials[0]), [0.1], "crashed", final=True)
        write_rounds(both.of(both.trials[1]), [0.1], "crashed")
        assert [both.is_over(trial) for trial in both.trials] == [True, False]

    def test_without_a_target_the_end_is_the_end(self, tmp_path: Path):
        alone = rivals(tmp_path, 0.1, target=None)
        assert not alone.is_over(alone.trials[0])
        write_rounds(alone.of(alone.trials[0]), [0.1, 0.2], "finished")
        assert alone.is_over(alone.trials[0]) and alone.rounds(alone.trials[0]) is None

    def test_the_leader_is_the_closest_where_none_is_there(self, tmp_path: Path):
        three = rivals(tmp_path, 0.1, 0.2, 0.3)
        assert three.leader("cell", 0) is None
        for trial, peak in zip(three.trials, (0.6, 0.8), strict=False):
            write_rounds(three.of(trial), [peak, 0.5])
        assert three.leader("cell", 0) == three.trials[1]


class TestMarkdown:
    def test_a_table(self):
        assert table(["a", "b"], [["x", "1"], ["y", "2"]]).splitlines() == [
            "| a | b |",
            "| --- | ---: |",
            "| x | 1 |",
            "| y | 2 |",
        ]

    def test_rounds_say_what_is_known(self, tmp_path: Path):
        both = rivals(tmp_path, 0.1, 0.2)
        assert rounds_of(both, "cell") == rounds_of(both, "another") == "–"
        write_rounds(both.of(both.trials[0]), [0.1] * 7, "finished")
        assert rounds_of(both, "cell") == "–"
        write_rounds(both.of(both.trials[1]), [0.1] * 6, "crashed", final=True)
        assert rounds_of(both, "cell") == ">7"
        three = rivals(tmp_path, 0.1, 0.2, 0.3)
        write_rounds(three.of(three.trials[2]), [0.1, 0.5, 0.9])
        assert rounds_of(three, "cell") == "3 (0.3)"

    def test_spread(self):
        assert spread([0.841, 0.843, 0.845]) == "84.3 ± 0.2"
        assert spread([0.8432]) == "84.3"
        assert spread([1.5, 1.5], unit=1, digits=3) == "1.500 ± 0.000"

    @pytest.mark.parametrize("module", evidence.TABLES.values())
    def test_every_table_can_be_told_before_a_run_is_over(self, module, tmp_path: Path):
        lines = module.text(Series(module.trials((0,)), tmp_path)).splitlines()
        assert len(lines) > 4 and len({line.count("|") for line in lines}) == 1
        assert all("–" in line for line in lines[2:])
        assert all(
            not any("=" in part for part in parts) for parts in module.figures(Series([], tmp_path), (0,)).values()
        )

    def test_a_learning_rate_is_chosen_by_validation_and_never_by_test(self, tmp_path: Path):
        """0.1 has the best test accuracy, 0.03 the best validation accuracy, until it diverges."""
        chosen = Series([trial for trial in fashion.trials((0,)) if trial.cell == "fedavg"], tmp_path)
        for trial, validation, test in zip(chosen.trials, (0.5, 0.7, 0.6), (0.8, 0.7, 0.9), strict=True):
            write_rounds(chosen.of(trial), [], "finished")
            line = {"round": 1, "validation/accuracy": validation, "test/accuracy": test, "clients/worst_accuracy": 0.1}
            (chosen.of(trial) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert "| fedavg | 0.03 | 70.0 | 10.0 |" in fashion.text(chosen).splitlines()
        RunDir(chosen.of(chosen.trials[1])).set_status("crashed", final=True)
        assert "| fedavg | 0.1 | 90.0 | 10.0 |" in fashion.text(chosen).splitlines()

    def test_data_parallelism_sends_every_step_what_diloco_sends_a_round(self, tmp_path: Path):
        there = Series(diloco.trials((0,)), tmp_path)
        for trial in there.trials:
            write_rounds(there.of(trial), [], "finished")
            rounds = [{"round": i, "test/loss": 4 - i / 10, "bytes_between_silos": i * 3_000_000} for i in range(1, 21)]
            (there.of(trial) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
        assert [line.split(" | ")[1:] for line in diloco.text(there).splitlines()[2:]] == [
            ["3.500", "3.000", "2.000", "6,000 |"],
            ["3.500", "3.000", "2.000", "300 |"],
            ["3.500", "3.000", "2.000", "60 |"],
        ]

    def test_a_student_is_compared_with_itself_alone_seed_by_seed(self, tmp_path: Path):
        """The distilled one is better with seed 0, and not with seed 1."""
        there = Series(distillation.DIGITS.trials((0, 1)), tmp_path)
        accuracies = {("sync-alone", 0): 0.7, ("sync-distilled", 0): 0.8, ("sync-alone", 1): 0.9, ("teacher", 0): 0.95}
        for trial in there.trials:
            write_rounds(there.of(trial), [0.1, accuracies.get((trial.cell, trial.seed), 0.5)], "finished")
        assert [line.split(" | ")[1:] for line in distillation.DIGITS.text(there).splitlines()[2:]] == [
            ["95.0", "– |"],
            ["80.0 ± 14.1", "50.0 ± 0.0 |"],
            ["65.0 ± 21.2", "50.0 ± 0.0 |"],
            ["1 of 2", "0 of 2 |"],
        ]


class TestTrials:
    def test_names_are_unique_and_seeds_and_rates_are_told_apart(self):
        for module in evidence.TABLES.values():
            trials = module.trials((0, 1))
            assert len({trial.name for trial in trials}) == len(trials)
            cells = {(trial.cell, trial.overrides) for trial in trials}
            assert len({cell for cell, _ in cells}) == len(cells)

    def test_overrides_compose(self, tmp_path: Path):
        """One trial for each choice of groups; the others differ only in numbers."""
        kinds = {tuple(o for o in trial.overrides if o.split("=")[1].isidentifier()): trial for trial in EVERY_TRIAL}
        for trial in kinds.values():
            tree = compose_tree(trial.arguments(tmp_path))
            assert tree["run_dir"] == str(tmp_path / trial.name)
            assert (tree["optimizer"]["lr"], tree["seed"]) == (trial.lr, trial.seed)
            assert tree["launch"]["nproc_per_node"] == trial.workers >= tree["silos"]

    def test_mcmahan_is_what_the_paper_says(self, tmp_path: Path):
        trial = next(t for t in mcmahan.trials((0,)) if t.cell == "2nn-shards-clients20-epochs1")
        tree = compose_tree(trial.arguments(tmp_path))
        assert (
            tree["clients"],
            tree["client_sampling"]["clients_per_round"],
            tree["batch_size"],
            tree["round"]["epochs"],
        ) == (
            100,
            20,
            10,
            1,
        )
        assert tree["partition"]["per_client"] == 2 and tree["data"]["validation"] == 0
        assert (trial.target, tree["rounds"]) == (0.97, 928)
        assert all(t.target == 0.99 for t in mcmahan.trials((0,)) if t.cell.startswith("cnn"))

    def test_an_epoch_of_scaffold_is_five_steps_and_sgd_takes_one(self, tmp_path: Path):
        trees = {t.cell: t for t in scaffold.trials((0,))}
        tree = compose_tree(trees["scaffold-epochs10-similar10"].arguments(tmp_path))
        assert (tree["partition"]["similarity"], tree["round"]["epochs"], tree["rounds"]) == (0.1, 10, 200)
        assert 60_000 / tree["clients"] / tree["batch_size"] == 5
        tree = compose_tree(trees["sgd-epochs1-similar0"].arguments(tmp_path))
        assert (tree["batch_size"], tree["round"]["steps"]) == ("all", 1)

    def test_diloco_and_data_parallelism_see_as_many_tokens(self, tmp_path: Path):
        trees = [compose_tree(trial.arguments(tmp_path)) for trial in diloco.trials((0,))]
        assert {t["rounds"] * t["round"]["steps"] * t["batch_size"] * t["silos"] for t in trees} == {2000 * 32}
        assert {t["eval"]["every_rounds"] * t["round"]["steps"] for t in trees} == {100}


# In place of the trainer: a run that improves by 0.1 * lr with every round, and stops at SIGTERM. A teacher that it has
# must have finished.
RUN = """
import json, signal, sys, time
from pathlib import Path
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
folder = Path(given["run_dir"])
assert "task.teacher" not in given or Path(given["task.teacher"], "state.json").exists()
folder.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for round in range(1, 101):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": round, "test/accuracy": 0.1 * float(given["optimizer.lr"]) * round}) + "\\n")
    time.sleep(0.02)
(folder / "state.json").write_text('{"status": "finished"}')
"""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return runs of the script above, which are polled often."""
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(series, "TRAINER", (sys.executable, str(tmp_path / "run.py")))
    monkeypatch.setattr(series, "POLL_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(series, "LOOKS_PER_READING", 1)


@pytest.mark.usefixtures("quick")
class TestRunner:
    def test_runs_end_at_the_target_and_not_again(self, tmp_path: Path):
        both = rivals(tmp_path, 1.0, 0.5, target=0.85)
        assert Runner(both, "", jobs=2).run() == []
        assert rounds_of(both, "cell") == "8 (1)" or rounds_of(both, "cell") == "9 (1)"
        assert all(both.rounds_done(trial) < 100 for trial in both.trials)
        assert Runner(both, "", jobs=2).waiting == []

    def test_only_what_was_asked_for(self, tmp_path: Path):
        both = rivals(tmp_path, 1.0, 0.5, target=0.85)
        assert Runner(both, "lr0.5", jobs=1).run() == []
        assert [both.rounds_done(trial) > 0 for trial in both.trials] == [False, True]

    def test_a_student_waits_for_its_teacher(self, tmp_path: Path):
        trials = [Trial("teacher", 1.0, 0, ()), Trial("student", 1.0, 0, (), teacher="teacher-lr1-seed0")]
        assert Runner(Series(trials, tmp_path), "", jobs=2).run() == []

    def test_a_failure_is_told_with_its_log_and_the_others_go_on(self, tmp_path: Path):
        (tmp_path / "run.py").write_text("raise SystemExit('no such thing')")
        both = rivals(tmp_path, 1.0, 0.5)
        failed = Runner(both, "", jobs=1).run()
        assert len(failed) == 2 and all("failed with exit code 1" in line for line in failed)
        assert Path(failed[0].split(": ")[1]).read_text() == "no such thing\n"


def test_curves_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evidence, "IMAGES", tmp_path)
    there = Series([next(t for t in scaffold.trials((0,)) if t.cell == "scaffold-epochs1-similar0")], tmp_path)
    write_rounds(there.of(there.trials[0]), [0.5, 0.8], "finished")
    pictures = scaffold.figures(there, (0,))
    evidence.draw({"scaffold.png": pictures["scaffold_epochs1.png"]})
    assert (tmp_path / "scaffold.png").read_bytes().startswith(b"\x89PNG")


def test_a_client_that_has_all_test_examples_is_judged_on_all(ranks, tmp_path: Path):
    """With one client its kind of examples is the whole test set, so both evaluations must agree."""
    ranks(2).run(work, ["algorithm=local", "clients=1", "rounds=1", f"run_dir={tmp_path / 'run'}"])
    assert accuracy_on_all(tmp_path / "run") == RunDir(tmp_path / "run").result()["test/accuracy"]
