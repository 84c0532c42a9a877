"""Experiment trackers, if installed: a resumed run continues the tracker's run of its run folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.loggers import FinalArtifacts, Logger, Metrics
from trainer.loggers.wandb_mlflow import MLFlowLogger, WandbLogger

SETTINGS = {"name": "digits-sync", "optimizer.lr": 0.1}
ROUNDS: list[Metrics] = [{"round": index, "train/loss": 1 / index} for index in (1, 2, 3)]


def log(logger: Logger, rounds: list[Metrics], *, is_last: bool) -> None:
    for metrics in rounds:
        logger.log_round(metrics)
    if is_last:
        logger.finalize({"round": 3, "test/accuracy": 0.9}, FinalArtifacts())
    logger.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from its database library
def test_mlflow_has_all_rounds_of_a_resumed_run(tmp_path: Path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log(MLFlowLogger(tmp_path, SETTINGS, uri=uri), ROUNDS[:2], is_last=False)
    log(MLFlowLogger(tmp_path, SETTINGS, uri=uri), ROUNDS[2:], is_last=True)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("silotrain").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optimizer.lr"] == "0.1"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 1 / 2, 1 / 3]
    assert run.data.metrics["result/test/accuracy"] == 0.9


def test_wandb_writes_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(WandbLogger(tmp_path, SETTINGS), ROUNDS, is_last=True)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0


@pytest.mark.parametrize(("make", "package"), [(WandbLogger, "wandb"), (MLFlowLogger, "mlflow")])
def test_a_missing_package_is_named(make, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        make(tmp_path, SETTINGS)
