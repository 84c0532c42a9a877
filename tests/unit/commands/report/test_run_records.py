"""Runs read from their folders: found at any depth, each once, with the rounds so far."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.support.folders import EXAMPLES, rounds_of, write_rounds, write_run
from trainer.commands.report.run_records import read_records


def test_runs_are_found_at_any_depth_and_each_once(tmp_path: Path) -> None:
    shallow = write_run(tmp_path / "a", test_accuracy=[0.5])
    deep = write_run(tmp_path / "sweep/lr/0", test_accuracy=[0.5])
    (tmp_path / "sweep/empty").mkdir()
    (tmp_path / "link").symlink_to(shallow)
    found = [record.folder for record in read_records([tmp_path, deep, shallow, tmp_path / "link"])]
    assert sorted(path.resolve() for path in found) == [shallow, deep]


def test_what_lies_in_a_run_is_no_run_of_its_own(tmp_path: Path) -> None:
    """A checkpoint or a copy inside a run's folder belongs to the run."""
    run = write_run(tmp_path / "a", test_accuracy=[0.5])
    write_run(run / "copy", test_accuracy=[0.9])
    assert [record.folder for record in read_records([tmp_path])] == [run]


def test_a_finished_run_is_known_by_its_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", seed=3, test_accuracy=[0.5, 0.75], test_loss=[2.0, math.inf])
    (record,) = read_records([run])
    assert (record.status, record.status_text, record.seed) == ("finished", "finished", 3)
    assert record.metrics["test/accuracy"] == 0.75 and math.isnan(record.metrics["test/loss"])
    assert [metrics["test/accuracy"] for metrics in record.rounds] == [0.5, 0.75]
    assert math.isnan(record.rounds[1]["test/loss"]), "null, so it was measured, and was not finite"


@pytest.mark.parametrize("status", ["running", "preempted", "crashed"])
def test_an_unfinished_run_is_known_by_what_it_measured_last(tmp_path: Path, status: str) -> None:
    """The rate is that of all its rounds without evaluation, as in a result."""
    run = write_run(tmp_path / "a", "rounds=9", status=status, test_accuracy=[0.5, 0.75], round_steps=[1, 1])
    (record,) = read_records([run])
    assert record.status_text == f"{status} 2/9"
    assert record.metrics["test/accuracy"] == 0.75
    assert record.metrics["examples_per_second"] == EXAMPLES
    assert "round/steps" not in record.metrics, "of a round, not of the run"


def test_a_figure_that_is_not_measured_in_every_round_is_the_last_that_there_is(tmp_path: Path) -> None:
    rounds = rounds_of({"train/loss": [3.0, 2.0, 1.0]})
    rounds[1]["test/accuracy"] = 0.5
    write_rounds(tmp_path / "a", (), 0, rounds, "crashed")
    (record,) = read_records([tmp_path])
    assert (record.metrics["train/loss"], record.metrics["test/accuracy"]) == (1.0, 0.5)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "rounds=9", status="running", test_accuracy=[0.5, 0.75])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "test/accu')
    (record,) = read_records([run])
    assert len(record.rounds) == 2 and record.status_text == "running 2/9"


def test_a_run_that_has_measured_nothing_is_there(tmp_path: Path) -> None:
    (record,) = read_records([write_run(tmp_path / "a", "rounds=9", status="bad_input")])
    assert (record.metrics, record.rounds, record.status_text) == ({}, [], "bad_input 0/9")


def test_a_finished_run_that_goes_on_is_known_by_its_rounds(tmp_path: Path) -> None:
    """result.json belongs to the smaller number of rounds of the first run."""
    run = write_run(tmp_path / "a", "rounds=9", test_accuracy=[0.5, 0.75])
    (run / "state.json").write_text(json.dumps({"status": "running"}))
    (run / "result.json").write_text(json.dumps({"round": 1, "test/accuracy": 0.1}))
    assert read_records([run])[0].metrics["test/accuracy"] == 0.75


def test_the_figures_of_clients_are_kept_apart(tmp_path: Path) -> None:
    rounds = rounds_of({"test/accuracy": [0.5, 0.75]})
    for index, metrics in enumerate(rounds):
        metrics |= {f"client/{client}/test_accuracy": client / 10 + index for client in (0, 2)}
    write_rounds(tmp_path / "a", (), 0, rounds, "finished")
    (record,) = read_records([tmp_path])
    assert not [name for metrics in record.rounds for name in metrics if name.startswith("client/")]
    (figure,) = record.clients
    assert (figure.name, figure.clients, figure.rounds) == ("test_accuracy", [0, 2], [1, 2])
    assert np.array_equal(figure.values, [[0.0, 1.0], [0.2, 1.2]])


def test_folders_without_runs_are_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no runs") as error:
        read_records([tmp_path / "empty", tmp_path / "nowhere"])
    assert "nowhere is not a folder" in str(error.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", ""),
        ("state.json", "{"),
        ("state.json", "{}"),
        ("result.json", "{"),
        ("metrics.jsonl", "{\n"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, file: str, text: str) -> None:
    run = write_run(tmp_path / "a", test_accuracy=[0.5])
    (run / file).write_text(text)
    with pytest.raises(ValueError, match="a is damaged"):
        read_records([run])


def test_the_figures_of_many_clients_are_streamed(tmp_path: Path) -> None:
    """Of each round stays what a page draws: 12 bytes for each client's score, of 90 in the file."""
    clients, rounds = 1000, 30
    names = [f"client/{client}/{name}" for client in range(clients) for name in ("test_accuracy", "train_loss")]
    write_rounds(tmp_path / "a", (), 0, rounds_of({name: [0.5] * rounds for name in names}), "crashed")
    tracemalloc.start()
    (record,) = read_records([tmp_path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (metric,) = record.clients
    assert metric.values.shape == (clients, rounds) and (metric.values == 0.5).all()
    assert peak < 60 * clients * rounds
