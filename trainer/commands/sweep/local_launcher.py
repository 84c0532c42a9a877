"""The sweep's launcher for this machine: jobs one after another, or several at a time on disjoint shares of it.

hydra.launcher.jobs: so many at a time, each on its own part of the cores and the GPUs.
hydra.launcher.part: [2,8] is the third of eight parts of the jobs, for machines that share the work of one sweep.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from trainer.commands.sweep.job import Job, make_job
from trainer.commands.sweep.job_queue import JobQueue
from trainer.distributed.launch.subprocesses import ResourceSlot

T = TypeVar("T")


def launch(
    overrides: Sequence[Sequence[str]], config: DictConfig, jobs: int, part: Sequence[int] | None, before: int
) -> list[float | None]:
    """The objective of each job; None for one that failed, or that belongs to another part.

    before: so many jobs the sweeper has launched already.
    """
    wanted = [make_job_from_hydra(each, config, config.hydra) for each in overrides]
    index, parts = part or (0, 1)
    mine = dict.fromkeys(wanted[index::parts])  # sweepers may propose the same twice
    queue = JobQueue(list(mine), resource_slots(jobs), config.objective, before, config.hydra.sweeper.get("n_trials"))
    outcomes = queue.run()
    return [outcomes[job].objective if job in outcomes else None for job in wanted]


def make_job_from_hydra(overrides: Sequence[str], config: DictConfig, hydra: Any) -> Job:
    """The job that a sweeper has made of these overrides, as the plan of the sweep has named it."""
    return make_job(overrides, Path(config.run_dir), hydra.job.config.override_dirname.exclude_keys)


def resource_slots(jobs: int) -> list[ResourceSlot]:
    """This machine's cores and GPUs for so many jobs at a time; all of it for one.

    Cores that are too few are shared. GPUs that are too few are left to the jobs, which then do not want any.
    """
    if jobs == 1:
        return [ResourceSlot(frozenset(os.sched_getaffinity(0)))]
    cores = sorted(os.sched_getaffinity(0))
    gpus = visible_gpus()
    return [
        ResourceSlot(
            frozenset(slice_items(cores, index, jobs) or [cores[index % len(cores)]]),
            ",".join(slice_items(gpus, index, jobs)) if len(gpus) >= jobs else None,
        )
        for index in range(jobs)
    ]


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def slice_items(items: Sequence[T], index: int, parts: int) -> Sequence[T]:
    """One of so many parts of a list, which differ by at most one in length."""
    return items[len(items) * index // parts : len(items) * (index + 1) // parts]
