"""Starts the workers of this machine through torchrun's agent, and waits for them."""

from __future__ import annotations

import logging
import os
import sys
import uuid
import warnings
from typing import Any

import torch


def choose_nproc(nproc: int | str, device: str) -> int:
    """The number of workers: one a visible GPU, else 2, when it is left to us."""
    if nproc != "auto":
        return int(nproc)
    return (torch.cuda.device_count() if device != "cpu" else 0) or 2


def choose_threads(threads: int | str, workers: int) -> int:
    """The CPU threads of one of the workers on this machine: the cores divided, when it is left to us."""
    if threads != "auto":
        return int(threads)
    return max(1, len(os.sched_getaffinity(0)) // workers)


def run_workers(nproc: int, threads: int) -> dict[str, Any]:
    """Runs `python -m trainer` in `nproc` workers; what is known of the first failure, nothing if all ended well.

    When one fails the agent ends the others. A worker says itself why it failed, unless a signal killed it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            elastic_launch(config, sys.executable)("-u", "-m", "trainer")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return {"rank": rank}
        print(f"rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return {"rank": rank, "error": f"killed by {failure.signal_name()}"}
    except SignalException as error:
        return {"error": f"ended by {error.sigval.name}"}
    return {}
