"""Hydra plugin for the launcher of `local_launcher.py`.

`hydra_plugins.py`, two folders up, adds this folder to the path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Runs the jobs of a sweep on this machine.

    trainer/commands/sweep/local_launcher.py describes its keys.

    Hydra imports this module with every composition, so it imports the code that runs jobs only when needed.
    """

    def __init__(self, jobs: int, part: Sequence[int] | None) -> None:
        self._jobs, self._part = jobs, part
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        from trainer.commands.sweep.local_launcher import launch

        assert self._config is not None
        values = launch(job_overrides, self._config, self._jobs, self._part, initial_job_idx)
        return [_completed(value) for value in values]


def _completed(value: float | None) -> JobReturn:
    """Return a completed job with this value, None for a failed one.

    With a failed status, sweepers would end the sweep.
    """
    from hydra.core.utils import JobStatus

    return JobReturn(status=JobStatus.COMPLETED, _return_value=value)
