"""`python -m trainer -m`: runs a sweep and prints its table."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from hydra.errors import HydraException

from trainer.commands.exit_codes import FAILED, FINISHED, PREEMPTED
from trainer.commands.sweep import hydra_plugins, messages
from trainer.commands.sweep.job import assign, find_jobs
from trainer.commands.sweep.local_launcher import run_job
from trainer.commands.sweep.sweep_plan import SweepPlan, make_plan
from trainer.distributed.environment import is_worker
from trainer.distributed.launch.signals import Terminated, raise_on_stop_signal
from trainer.loggers import make_terminal

INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Run a sweep and return its exit code.

    0: all jobs have finished, 1: some failed, 75 or 130: interrupted. Raises ValueError for bad input.
    """
    if is_worker(arguments):
        raise ValueError(
            "a sweep starts its own workers\n  start it without torchrun or srun: python -m trainer -m ..."
        )
    plan = make_plan(arguments)
    logging.disable(logging.WARNING)  # of Hydra and its plugins
    if plan.launcher != "local":
        print(f"{plan.launcher} runs the jobs; their output: {plan.folder / 'logs'}", flush=True)
    try:
        with raise_on_stop_signal():
            hydra_plugins.hydra_context().multirun("sweep", run_job, list(plan.overrides))
    except (Terminated, KeyboardInterrupt) as error:
        again = [argument for argument in arguments if not argument.startswith("run_dir=")]
        command = shlex.join(["python", "-m", "trainer", "-m", *again, assign("run_dir", str(plan.folder))])
        print(f"interrupted; continue with\n  {command}", file=sys.stderr, flush=True)
        return PREEMPTED if isinstance(error, Terminated) else INTERRUPTED
    except (HydraException, ValueError, RuntimeError) as error:
        print(f"the sweep has ended early: {error}", file=sys.stderr, flush=True)
        _conclude(plan)
        return FAILED
    return _conclude(plan)


def _conclude(plan: SweepPlan) -> int:
    """Print the table; the exit code for it."""
    jobs = find_jobs(plan.folder) if plan.jobs is None else plan.jobs
    outcomes = {job: job.outcome(plan.objective) for job in jobs}
    terminal = make_terminal(sys.stdout)
    for spans in messages.table(outcomes, plan.objective, plan.folder):
        terminal.line(*spans)
    unfinished = {outcome.status for outcome in outcomes.values() if not outcome.is_finished}
    if unfinished <= {"preempted", "running", "waiting"}:
        return PREEMPTED if unfinished else FINISHED
    return FAILED
