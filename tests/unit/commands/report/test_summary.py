"""Configurations: mean and spread against numpy, their order, their baselines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.folders import write_run
from trainer.commands.report.baselines import baselines, compare_to_baselines
from trainer.commands.report.run_records import read_records
from trainer.commands.report.summary import Report, spread_of, summarize


def report_on(folder: Path, by: str | None = None) -> Report:
    return summarize(read_records([folder]), by)


def labels(report: Report) -> list[str]:
    return [configuration.label for configuration in report.configurations]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_the_spread_is_numpys_with_one_degree_of_freedom_less(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread.runs == len(values)
    assert np.allclose([spread.mean, spread.deviation], [np.mean(values), np.std(values, ddof=1)], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf], [1.0, math.nan, 2.0]])
def test_what_is_not_finite_is_not_averaged_away(values: list[float]) -> None:
    assert math.isnan(spread_of(values).mean) and math.isnan(spread_of(values).deviation)


def test_one_run_has_no_deviation() -> None:
    assert spread_of([2.5])[0] == 2.5 and math.isnan(spread_of([2.5]).deviation)


def test_seeds_are_put_together_and_the_best_comes_first(tmp_path: Path) -> None:
    for lr, accuracies in {"0.1": (0.5, 0.7), "0.2": (0.9, 0.7), "0.3": (0.1, 0.2)}.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path / f"{lr}-{seed}", f"optimizer.lr={lr}", seed=seed, test_accuracy=[0.0, accuracy])
    report = report_on(tmp_path)
    assert (report.score, report.columns) == ("test/accuracy", ("optimizer.lr",))
    assert labels(report) == ["lr=0.2", "lr=0.1", "lr=0.3"]
    assert [configuration.seeds for configuration in report.configurations] == ["2"] * 3
    best = report.configurations[0].spread("test/accuracy")
    assert best == pytest.approx((0.8, np.std([0.9, 0.7], ddof=1), 2))


@pytest.mark.parametrize(
    ("figure", "by", "order"),
    [
        ("test_perplexity", None, ["lr=0.1", "lr=0.2"]),
        ("test_loss", None, ["lr=0.1", "lr=0.2"]),
        ("train_loss", "train/loss", ["lr=0.1", "lr=0.2"]),
        ("clients_jain", "clients/jain", ["lr=0.2", "lr=0.1"]),
        ("validation_accuracy", "validation/accuracy", ["lr=0.2", "lr=0.1"]),
    ],
)
def test_which_is_better_hangs_on_the_figure(tmp_path: Path, figure: str, by: str | None, order: list[str]) -> None:
    write_run(tmp_path / "a", "optimizer.lr=0.1", **{figure: [1.5]})  # pyright: ignore[reportArgumentType]
    write_run(tmp_path / "b", "optimizer.lr=0.2", **{figure: [2.5]})  # pyright: ignore[reportArgumentType]
    assert labels(report_on(tmp_path, by)) == order


def test_a_figure_that_no_run_has_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write_run(tmp_path / "a", test_accuracy=[0.5])
    with pytest.raises(ValueError, match=r"--by test/acuracy: no run has this metric; did you mean test/accuracy\?"):
        report_on(tmp_path, "test/acuracy")


def test_finished_runs_alone_count_where_there_are_any(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "rounds=9", seed=0, test_accuracy=[0.5])
    write_run(tmp_path / "1", "rounds=9", seed=1, status="crashed", test_accuracy=[0.9])
    (configuration,) = report_on(tmp_path).configurations
    assert configuration.spread("test/accuracy").mean == 0.5
    assert (configuration.seeds, configuration.status_text) == ("1", "crashed 1/9")


def test_unfinished_configurations_come_after_finished_ones_and_those_without_a_score_last(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "optimizer.lr=0.1", test_accuracy=[0.5])
    write_run(tmp_path / "1", "optimizer.lr=0.2", status="running", test_accuracy=[0.9])
    write_run(tmp_path / "2", "optimizer.lr=0.3", status="bad_input")
    write_run(tmp_path / "3", "optimizer.lr=0.4", test_accuracy=[math.nan])
    assert labels(report_on(tmp_path)) == ["lr=0.1", "lr=0.4", "lr=0.2", "lr=0.3"]


def test_two_runs_of_one_seed_are_not_two_seeds(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "launch.nproc_per_node=1", test_accuracy=[0.5])
    write_run(tmp_path / "1", "launch.nproc_per_node=2", test_accuracy=[0.5])
    (configuration,) = report_on(tmp_path).configurations
    assert configuration.seeds == "1 (2 runs)"


def test_one_configuration_is_called_by_its_name(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "name=mine", test_accuracy=[0.5])
    assert labels(report_on(tmp_path)) == ["mine"]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_verdict_is_lower_ours_upper(lower: float, ours: float, upper: float) -> None:
    message = compare_to_baselines(lower, ours, upper, higher_is_better=True)
    assert message.startswith("between") == (lower <= ours <= upper)
    assert message.startswith("worse than alone") == (ours < lower)
    mirrored = compare_to_baselines(-lower, -ours, -upper, higher_is_better=False)
    assert mirrored.split(",")[0].split(":")[0] == message.split(",")[0].split(":")[0]


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (None, None, ""),
        (0.25, None, "not worse than alone, 0.2500"),
        (None, 0.75, "not better than pooled, 0.7500"),
        (0.625, None, "worse than alone, 0.6250"),
        (None, 0.375, "better than pooled, 0.3750"),
    ],
)
def test_one_baseline_is_compared_alone(lower: float | None, upper: float | None, message: str) -> None:
    assert compare_to_baselines(lower, 0.5, upper, higher_is_better=True) == message


SKEWED = ("silos=2", "partition=dirichlet", "partition.alpha=0.1")


def test_baselines_are_of_the_same_data_and_the_best_of_each_counts(tmp_path: Path) -> None:
    """Pooled data may be partitioned differently, the data of clients alone may not.

    An unfinished run is not a baseline.
    """
    write_run(tmp_path / "0", "algorithm=fedavg", *SKEWED, test_accuracy=[0.5])
    write_run(tmp_path / "1", "algorithm=local", *SKEWED, test_accuracy=[0.25])
    write_run(tmp_path / "2", "algorithm=local", *SKEWED, "optimizer.lr=0.3", test_accuracy=[0.125])
    write_run(tmp_path / "3", "algorithm=local", "silos=2", test_accuracy=[0.75])
    write_run(tmp_path / "4", "algorithm=sync", test_accuracy=[0.875])
    write_run(tmp_path / "5", "algorithm=sync", "optimizer.lr=0.3", status="running", test_accuracy=[0.9])
    write_run(tmp_path / "6", "algorithm=sync", "model=mlp", "model.inputs=64", test_accuracy=[0.375])
    message = sorted(baselines(report_on(tmp_path)))
    assert message == [
        "alone: the lower baseline",
        "alone: the lower baseline",
        "alone: the lower baseline",
        "between: alone 0.2500, pooled 0.8750",
        "pooled: the upper baseline",
        "pooled: the upper baseline",
        "pooled: the upper baseline",
    ]


def test_as_many_clients_are_as_many_whether_they_were_named_or_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "algorithm=fedavg", "clients=2", test_accuracy=[0.5])
    write_run(tmp_path / "1", "algorithm=local", "silos=2", test_accuracy=[0.25])
    write_run(tmp_path / "2", "algorithm=local", "clients=3", test_accuracy=[0.375])
    assert "not worse than alone, 0.2500" in baselines(report_on(tmp_path))


def test_a_report_of_baselines_alone_compares_nothing(tmp_path: Path) -> None:
    """An example is a sweep of synchronous runs."""
    write_run(tmp_path / "0", test_accuracy=[0.5])
    write_run(tmp_path / "1", "optimizer.lr=0.3", test_accuracy=[0.25])
    assert baselines(report_on(tmp_path)) == ["", ""]
