"""Where Hydra finds the launcher of `local_launcher.py`: see `hydra_plugins.py`, two folders up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Runs the jobs of a sweep on this machine; trainer/commands/sweep/local_launcher.py says what its keys mean.

    Hydra imports this module whenever it composes anything, so what runs jobs is imported when there are some.
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
    """What sweepers take for a job that ended with this value; None is a failed one, and does not end the sweep."""
    from hydra.core.utils import JobStatus

    return JobReturn(status=JobStatus.COMPLETED, _return_value=value)
