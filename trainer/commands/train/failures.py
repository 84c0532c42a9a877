"""Reports of a worker that fails: on its standard error, in its log and in state.json."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from trainer.checkpoint.run_dir import RunDir, Status
from trainer.commands.exit_codes import DISK_FAILURE
from trainer.distributed import collectives
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.launch.heartbeat import Heartbeat
from trainer.loop.control import LoopControl
from trainer.loop.stopping import DivergedError
from trainer.utils.disk import DiskError
from trainer.utils.errors import InputError
from trainer.utils.user_code import user_location

log = logging.getLogger("trainer")
log.addHandler(logging.NullHandler())  # until the run folder is known, failures are printed only

# A rank that lost its peers first lets the one that failed report why, and end the world.
ROOT_CAUSE_GRACE_SECONDS = 3


def exit_on_failure(
    error: BaseException,
    environment: ClusterEnvironment,
    folder: RunDir | None,
    heartbeat: Heartbeat | None,
    control: LoopControl | None,
) -> NoReturn:
    """Report why this rank failed, and end the process at once: its peers may be waiting in a collective.

    Args:
        error: what ended the worker.
        environment: the position of this rank.
        folder: the run folder; None if it is not known yet.
        heartbeat: asks for the activities of the other ranks; None before there is one.
        control: knows whether this rank has made a step; None before there is one.
    """
    if isinstance(error, KeyboardInterrupt):
        os._exit(130)
    log.error("failed", exc_info=error)
    if isinstance(error, DivergedError):  # on all ranks
        if folder and environment.rank == 0:
            _record(folder, "crashed", error=str(error), final=True)
            print(error, file=sys.stderr, flush=True)
        time.sleep(0 if environment.rank == 0 else ROOT_CAUSE_GRACE_SECONDS)
        os._exit(1)
    location = "" if control and control.has_stepped else user_location(error)
    description = _describe(error, environment, heartbeat, location)
    is_bad_input = isinstance(error, InputError) or (location and not _is_of_peers(error))
    if folder and folder.path.exists() and folder.claim_failure("run"):
        where = f" ({location})" if location else ""
        status = "bad_input" if is_bad_input else "crashed"
        _record(folder, status, rank=environment.rank, error=f"{type(error).__name__}: {error}{where}")
    if folder and not folder.claim_failure(f"node-{environment.node}"):
        time.sleep(ROOT_CAUSE_GRACE_SECONDS)  # another rank of this node prints its own
    else:
        print(description, file=sys.stderr, flush=True)
    os._exit(DISK_FAILURE if isinstance(error, DiskError) else 1)


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log what has ended a thread, and print it, except for a disk: of that the main thread speaks, in a sentence."""
    error = failure.exc_value
    log.error("a thread failed", exc_info=error)
    if not isinstance(error, OSError):
        threading.__excepthook__(failure)


def _record(folder: RunDir, status: Status, **facts: Any) -> None:
    """Write the status of a run that fails, if its disk takes it: the launcher knows the exit code."""
    with suppress(OSError):
        folder.set_status(status, **facts)


def _is_of_peers(error: BaseException) -> bool:
    return collectives.has_timed_out(error) or collectives.has_lost_peers(error)


def _describe(error: BaseException, environment: ClusterEnvironment, heartbeat: Heartbeat | None, location: str) -> str:
    """Describe a failure. A rank that lost a peer waits first, so that the peer can report the cause.

    Args:
        error: what ended the worker.
        environment: the position of this rank.
        heartbeat: asks for the activities of the other ranks.
        location: the line of the user's code that failed before the first step; empty if none did.
    """
    rank = f"rank {environment.rank}"
    if heartbeat and collectives.has_timed_out(error):
        activities = heartbeat.activities(environment.world_size)
        return f"{rank} waited in vain while {heartbeat.activity()}:\n{activities}"
    if collectives.has_lost_peers(error):
        time.sleep(ROOT_CAUSE_GRACE_SECONDS)
        return f"{rank} lost its peers: {str(error).splitlines()[0]}"
    if isinstance(error, InputError):
        return f"{rank}: {error}"
    if isinstance(error, DiskError):
        return f"{rank}: {error.strerror}"
    if location:
        return f"{rank}: {type(error).__name__}: {error}\n  in {location}"
    return f"{rank} failed:\n{''.join(traceback.format_exception(error))}"
