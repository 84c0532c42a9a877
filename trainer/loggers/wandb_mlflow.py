"""Experiment trackers. Their packages are optional and imported when a logger is made."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trainer.loggers.base import FinalArtifacts, Metrics

RUN_ID_FILE = "mlflow.txt"  # in the run folder


class WandbLogger:
    """Logger to Weights & Biases. A resumed run continues the W&B run of its run folder.

    With WANDB_MODE=offline the run is written to the run folder, for `wandb sync`.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], project: str = "silotrain", entity: str | None = None
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("loggers.wandb needs the package wandb\n  pip install wandb") from error
        name = str(settings.get("name") or folder.name)
        self.run = wandb.init(
            project=project,
            entity=entity,
            id=blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest(),  # the same after a restart
            name=f"{name}/{folder.name}",
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def log_round(self, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=int(metrics["round"]))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        self.run.summary.update(result)

    def close(self) -> None:
        self.run.finish()


class MLFlowLogger:
    """Logger to MLflow. A resumed run continues the MLflow run of its run folder.

    uri: tracking server or folder of MLflow; None uses MLFLOW_TRACKING_URI.

    Raises:
        ValueError: mlflow is not installed.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], experiment: str = "silotrain", uri: str | None = None
    ):
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("loggers.mlflow needs the package mlflow\n  pip install mlflow-skinny") from error
        self.client, id_file = MlflowClient(uri), folder / RUN_ID_FILE
        if id_file.exists():
            self.id = id_file.read_text()
            self.client.update_run(self.id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
        name = f"{settings.get('name') or 'run'}/{folder.name}"
        self.id = self.client.create_run(experiment_id, run_name=name).info.run_id
        for key, value in settings.items():
            self.client.log_param(self.id, key, value)
        id_file.write_text(self.id)

    def log_round(self, metrics: Metrics) -> None:
        self._log(metrics, step=int(metrics["round"]))

    def log_step(self, metrics: Metrics) -> None:
        self._log({f"steps/{name}": value for name, value in metrics.items()}, step=int(metrics["step"]))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        self._log({f"result/{name}": value for name, value in result.items() if isinstance(value, int | float)}, step=0)
        self.client.set_terminated(self.id)

    def close(self) -> None:
        """Do nothing: the client keeps no connection."""

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.client.log_metric(self.id, name, float(value), step=step)
