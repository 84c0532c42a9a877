"""The task that Hydra's other launchers run, in whatever process and on whatever machine: one job of a sweep."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainer.commands.sweep.job_queue import JobQueue
from trainer.commands.sweep.local_launcher import make_job_from_hydra, resource_slots
from trainer.distributed.environment import detect_environment


def run_job(config: DictConfig) -> float | None:
    """The objective of a job, which `python -m trainer` runs in a process of its own; None if it failed.

    Told to leave, it first lets that one save. Then the handler that was there before has its turn, of which submitit's
    puts the job back into SLURM's queue; the job goes on from what is in its run folder.
    """
    hydra = HydraConfig.get()
    job = make_job_from_hydra(list(hydra.overrides.task), config, hydra)
    return JobQueue([job], resource_slots(1), config.objective, rank=detect_environment().rank).run()[job].objective
