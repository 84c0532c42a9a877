"""Settings of torch in this process: threads, precision, determinism."""

from __future__ import annotations

import os

import torch

from trainer.config.schema import Config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.launch.processes import choose_threads


def configure_torch(config: Config, environment: ClusterEnvironment) -> int:
    """Configure torch for this process; return its number of CPU threads."""
    threads = choose_threads(config.launch.threads_per_worker, environment.local_world_size)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.precision.tf32  # torch's own default is True, for convolutions alone
    if config.deterministic:  # the same bits in every run on GPUs, or RuntimeError where an operation cannot give them
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return threads


def resume_threads(config: Config, threads: int) -> str:
    """Take the number of CPU threads with which a run has trained, unless the configuration has another.

    Args:
        config: of the run.
        threads: what this rank had before.

    Returns:
        What differs, for the user; empty if nothing does.
    """
    now = torch.get_num_threads()
    if now == threads:
        return ""
    if config.launch.threads_per_worker != "auto":
        return (
            f"launch.threads_per_worker={now}, and the run has trained with {threads} until now: sums are divided in "
            "another way, and their last bits differ"
        )
    torch.set_num_threads(threads)
    return (
        f"{threads} threads a worker, as before, so that all bits stay the same; launch.threads_per_worker={now} would "
        "suit the cores of this machine"
    )
