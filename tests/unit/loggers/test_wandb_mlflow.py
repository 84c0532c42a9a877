"""Trackers of experiments, where they are installed: a run folder is one run of theirs, whenever it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.loggers import FinalArtifacts, Logger, Metrics
from trainer.loggers.wandb_mlflow import MLFlowLogger, WandbLogger

SETTINGS = {"name": "digits-sync", "optimizer.lr": 0.1}
ROUNDS: list[Metrics] = [{"round": index, "train/loss": 1 / index} for index in (1, 2, 3)]


def tell(sink: Logger, rounds: list[Metrics], *, is_last: bool) -> None:
    for metrics in rounds:
        sink.log_round(metrics)
    if is_last:
        sink.finalize({"round": 3, "test/accuracy": 0.9}, FinalArtifacts())
    sink.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the database below it
def test_mlflow_has_all_rounds_of_a_run_that_went_on(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tell(MLFlowLogger(tmp_path, SETTINGS, uri=uri), ROUNDS[:2], is_last=False)
    tell(MLFlowLogger(tmp_path, SETTINGS, uri=uri), ROUNDS[2:], is_last=True)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("silotrain").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optimizer.lr"] == "0.1"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 1 / 2, 1 / 3]
    assert run.data.metrics["result/test/accuracy"] == 0.9


def test_wandb_writes_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(WandbLogger(tmp_path, SETTINGS), ROUNDS, is_last=True)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.parametrize(("make", "package"), [(WandbLogger, "wandb"), (MLFlowLogger, "mlflow")])
def test_a_package_that_is_not_there_is_named(make, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        make(tmp_path, SETTINGS)
