"""Trackers of experiments; their packages are extras, and imported when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trainer.loggers.base import FinalArtifacts, Metrics

RUN_ID_FILE = "mlflow.txt"  # in the run folder: the id of its run


class WandbLogger:
    """A run of the project, with its configuration; of a run folder it is always the same one, which goes on.

    WANDB_MODE=offline writes it to the run folder, for `wandb sync`. Raises ValueError when wandb is not installed.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], project: str = "silotrain", entity: str | None = None
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("loggers.wandb needs the package wandb\n  pip install wandb") from error
        name = str(settings.get("name") or folder.name)
        same = blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self.run = wandb.init(
            project=project,
            entity=entity,
            id=same,
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
    """A run of the experiment, with its configuration as parameters; a run folder's run goes on where it was.

    `uri` is where MLFlowLogger keeps its runs; None: what MLFLOW_TRACKING_URI says. Raises ValueError when mlflow is not
    installed.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], experiment: str = "silotrain", uri: str | None = None
    ):
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("loggers.mlflow needs the package mlflow\n  pip install mlflow-skinny") from error
        self.client, note = MlflowClient(uri), folder / RUN_ID_FILE
        if note.exists():
            self.id = note.read_text()
            self.client.update_run(self.id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self.client.create_experiment(experiment)
        self.id = self.client.create_run(place, run_name=f"{settings.get('name') or 'run'}/{folder.name}").info.run_id
        for name, value in settings.items():
            self.client.log_param(self.id, name, value)
        note.write_text(self.id)

    def log_round(self, metrics: Metrics) -> None:
        self._log(metrics, step=int(metrics["round"]))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        self._log({f"result/{name}": value for name, value in result.items() if isinstance(value, int | float)}, step=0)
        self.client.set_terminated(self.id)

    def close(self) -> None:
        pass

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.client.log_metric(self.id, name, float(value), step=step)
