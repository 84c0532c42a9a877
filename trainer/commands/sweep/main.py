"""`python -m trainer -m`: runs a sweep and prints its table."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from hydra.errors import HydraException

from trainer.commands.exit_codes import FAILED, FINISHED, PREEMPTED
from trainer.commands.sweep import hydra_plugins
from trainer.commands.sweep.job import Job, Outcome, assign, find_jobs
from trainer.commands.sweep.local_launcher import run_job
from trainer.commands.sweep.sweep_plan import SweepPlan, make_plan
from trainer.distributed.environment import is_worker
from trainer.distributed.launch.signals import Terminated, raise_on_stop_signal
from trainer.loggers import higher_is_better, make_terminal
from trainer.loggers.messages import NAME_STYLE, NOTE_STYLE, number

INTERRUPTED = 130
MAX_LISTED = 20  # finished jobs in the table


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
    _print_table(outcomes, plan)
    unfinished = {outcome.status for outcome in outcomes.values() if not outcome.is_finished}
    if unfinished <= {"preempted", "running", "waiting"}:
        return PREEMPTED if unfinished else FINISHED
    return FAILED


def _print_table(outcomes: dict[Job, Outcome], plan: SweepPlan) -> None:
    """Print the finished jobs, best first, then the others."""
    values = {job: outcome.objective for job, outcome in outcomes.items() if outcome.objective is not None}
    order = sorted(values, key=lambda job: values[job], reverse=higher_is_better(plan.objective))
    shown = [number(values[job]) for job in order[:MAX_LISTED]]
    width = max(map(len, [plan.objective, *shown]))
    terminal = make_terminal(sys.stdout)
    terminal.line()
    terminal.line((plan.objective.rjust(width), NAME_STYLE), f"  {len(order)} of {len(outcomes)} jobs, best first")
    for text, job in zip(shown, order, strict=False):
        terminal.line(text.rjust(width), f"  {job.name}")
    if len(order) > MAX_LISTED:
        terminal.line("more".rjust(width), f"  {len(order) - MAX_LISTED}")
    for job, outcome in outcomes.items():
        if job not in values:
            terminal.line((outcome.status.rjust(width), NOTE_STYLE), f"  {job.name}  see {job.log}")
    terminal.line()
    terminal.line(f"more:  python -m trainer report {shlex.quote(str(plan.folder))}")
