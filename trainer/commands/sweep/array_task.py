"""The task that Hydra's other launchers run, in whatever process and on whatever machine: one job of a sweep."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from trainer.commands.sweep.job_queue import Queue
from trainer.commands.sweep.local_launcher import job_of, shares
from trainer.distributed.environment import discover


def run_job(config: DictConfig) -> float | None:
    """The objective of a job, which `python -m trainer` runs in a process of its own; None if it failed.

    Told to leave, it first lets that one save. Then the handler that was there before has its turn, of which submitit's
    puts the job back into SLURM's queue; the job goes on from what is in its run folder.
    """
    hydra = HydraConfig.get()
    job = job_of(list(hydra.overrides.task), config, hydra)
    return Queue([job], shares(1), config.objective, rank=discover().rank).run()[job].objective
