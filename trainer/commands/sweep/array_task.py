"""The task function of Hydra's other launchers: one job of a sweep."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainer.commands.sweep.job_queue import JobQueue
from trainer.commands.sweep.local_launcher import make_job_from_hydra, resource_slots
from trainer.distributed.environment import detect_environment


def run_job(config: DictConfig) -> float | None:
    """Run a job as a process `python -m trainer`; its objective, None if it failed.

    On a stop signal, the run saves first. Then the earlier signal handler is called: that of submitit requeues the job
    in SLURM, and the job resumes from its run folder.
    """
    hydra = HydraConfig.get()
    job = make_job_from_hydra(list(hydra.overrides.task), config, hydra)
    return JobQueue([job], resource_slots(1), config.objective, rank=detect_environment().rank).run()[job].objective
