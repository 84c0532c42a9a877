"""Jobs on this machine: one at a time, or several on disjoint parts.

hydra.launcher.jobs: number of jobs at a time, each on its own part of the cores and GPUs.
hydra.launcher.part: [2,8] is the third of eight parts of the jobs, for machines that share one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainer.commands.sweep.job import Job, make_job
from trainer.commands.sweep.job_queue import JobQueue
from trainer.distributed.environment import detect_environment
from trainer.distributed.launch.subprocesses import resource_slots


def launch(
    overrides: Sequence[Sequence[str]], config: DictConfig, jobs: int, part: Sequence[int] | None, before: int
) -> list[float | None]:
    """Run jobs; the objective of each, None if it failed or belongs to another part.

    Args:
        overrides: of each job.
        config: of the sweep.
        jobs: number of jobs at a time.
        part: index of this machine's part, and number of parts.
        before: number of jobs that the sweeper has launched before.
    """
    proposed = [make_job_from_hydra(texts, config, config.hydra) for texts in overrides]
    index, parts = part or (0, 1)
    queued = dict.fromkeys(proposed[index::parts])  # sweepers may propose the same job twice
    queue = JobQueue(list(queued), resource_slots(jobs), config.objective, before, config.hydra.sweeper.get("n_trials"))
    outcomes = queue.run()
    return [outcomes[job].objective if job in outcomes else None for job in proposed]


def run_job(config: DictConfig) -> float | None:
    """Run a job as the task function of Hydra's other launchers; its objective, None if it failed.

    On a stop signal, the run saves first. Then the earlier signal handler is called: that of submitit requeues the job
    in SLURM, and the job resumes from its run folder.
    """
    hydra = HydraConfig.get()
    job = make_job_from_hydra(list(hydra.overrides.task), config, hydra)
    return JobQueue([job], resource_slots(1), config.objective, rank=detect_environment().rank).run()[job].objective


def make_job_from_hydra(overrides: Sequence[str], config: DictConfig, hydra: Any) -> Job:
    """Return the job of a sweeper's overrides, named as in the plan of the sweep."""
    return make_job(overrides, Path(config.run_dir), hydra.job.config.override_dirname.exclude_keys)
