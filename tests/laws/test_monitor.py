"""The monitored metric chooses the best round and ends a run, in the direction that its name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.laws.cases import SIZES, assert_same, case_run, leaves
from tests.laws.test_client_scores import SCORES
from tests.laws.test_client_scores import data as two_classes
from tests.laws.test_stopping import choices_of, run_until
from tests.support.runs import make_clients, make_run
from trainer.checkpoint.format import find_saved
from trainer.checkpoint.run_dir import RunDir
from trainer.distributed.topology import distributed
from trainer.loggers import higher_is_better
from trainer.loop.monitor import metric_errors
from trainer.loop.options import MetricsOptions
from trainer.loop.stopping import StopCriteria

MONITORED = [
    "validation/loss",
    "validation/macro_f1",
    "validation/worst_accuracy",
    "clients/worst_accuracy",
    "test/calibration_error",
    "train/loss",
]


@pytest.mark.parametrize("name", MONITORED)
def test_the_best_round_is_that_of_the_best_value(ranks, name: str, tmp_path: Path):
    """By hand from the rounds' metrics; its checkpoint stays, and is best.safetensors."""
    choices = choices_of("mlp", monitor=name)
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    outcomes = ranks(2).run(run_until, "fedavg", 2, choices, folder.checkpoints)
    values = [metrics[name] for metrics in outcomes[0][1].rounds]
    best = (max if higher_is_better(name) else min)(values)
    for result, _ in outcomes:
        assert (result["monitor"], result["best_value"], result["best_round"]) == (name, best, values.index(best) + 1)
    folder.write_models({})
    saved = find_saved(folder.checkpoints / f"round-{values.index(best) + 1:06d}")
    assert saved
    assert_same(
        dict(sorted(leaves(saved.load("model")).items())), dict(sorted(load_file(folder.models["best"]).items()))
    )


def test_a_target_is_of_the_monitored_metric(ranks, tmp_path: Path):
    _, whole = ranks(2).run(run_until, "fedavg", 2, choices_of("mlp"), tmp_path / "whole")[0]
    losses = [metrics["validation/loss"] for metrics in whole.rounds]
    wanted = sorted(losses)[len(losses) // 2]
    rounds = next(index for index, loss in enumerate(losses, 1) if loss <= wanted)
    choices = choices_of("mlp", monitor="validation/loss", stop=StopCriteria(metric_target=wanted))
    result, _ = ranks(2).run(run_until, "fedavg", 2, choices, tmp_path / "ours")[0]
    assert (result["round"], result["stopped"]) == (rounds, "target")


def errors_of(**choices: Any) -> str:
    with distributed(1, device="cpu") as topology, pytest.raises(ValueError, match=r"set|valid") as raised:
        case_run(topology, "fedavg", choices)
    return str(raised.value)


def test_unknown_metrics_are_refused_with_the_valid_ones():
    unknown = errors_of(monitor="test/acuracy")
    assert "monitor=test/acuracy: this run measures no such metric; did you mean test/accuracy?" in unknown
    assert "test/sensitivity" in unknown and "clients/worst_accuracy" in unknown and "train/loss" in unknown
    assert "ema/" not in unknown and "validation/" not in unknown, "it has neither"
    assert "ema/accuracy" in errors_of(monitor="ema", ema_decay=0.9)
    assert "the task has no macrof1; did you mean macro_f1?" in errors_of(
        metrics=MetricsOptions(client_scores=("macrof1",))
    )
    hidden = MetricsOptions(client_scores=("macro_f1",), per_client="none")
    assert "set metrics.per_client=scores" in errors_of(metrics=hidden)
    needs = errors_of(monitor="validation/loss", stop=StopCriteria(patience_evaluations=1))
    assert "monitor=validation/loss and stop.patience_evaluations=1: no examples are held out" in needs


def test_what_a_task_measures_is_found_out_by_trying():
    """The area under the curve is of two classes: its name is known, but three classes have none."""
    with distributed(1, device="cpu") as topology:
        run = case_run(topology, "fedavg", {"monitor": "test/auc"})
        assert metric_errors(run, ["accuracy", "auc"]) == []
        (error,) = metric_errors(run, ["accuracy"])
        assert error.startswith("monitor=test/auc: this run measures no such metric")
        scores = MetricsOptions(client_scores=SCORES)
        clients = make_clients(SIZES[:3], 6)
        make_run(topology, SIZES[:3], data=two_classes(), clients=clients, metrics=scores, monitor="clients/worst_auc")


def test_a_result_is_plain_json(ranks, tmp_path: Path):
    outcomes = ranks(2).run(run_until, "fedavg", 2, choices_of("mlp"), tmp_path / "checkpoints")
    folder = RunDir(tmp_path)
    folder.write_result(outcomes[0][0])
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["monitor"] == "validation/accuracy"
    assert 1 <= stored["best_round"] <= stored["round"]
