"""How the jobs of a sweep are said on the console."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from trainer.commands.sweep.job import Job, Outcome, lower_is_better
from trainer.loggers.messages import NAME_STYLE, NOTE_STYLE, Span, number

MAX_NAMED = 4  # jobs on one line
MAX_LISTED = 20  # of the jobs that have finished, the best

TextLine = list[Span]


def progress(done: int, total: int, names: Sequence[str]) -> str:
    """How far the sweep is, and what runs now."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{done} of {total} jobs done; now {' and '.join(names[:MAX_NAMED])}{more}"


def ended(job: Job, outcome: Outcome, objective: str, seconds: float | None) -> list[TextLine]:
    """How a job has ended, in one line; why it failed in some more. `seconds` is None if it had nothing to do."""
    took = f"  {number(seconds)} s" if seconds is not None else "  was there"
    if outcome.objective is not None:
        return [[(job.name, NAME_STYLE), f"  {objective} {number(outcome.objective)}{took}"]]
    if outcome.status == "preempted":
        return [[(job.name, NAME_STYLE), f"  has saved and left{took}"]]
    return failed(job, outcome)


def failed(job: Job, outcome: Outcome) -> list[TextLine]:
    """That a job failed, where that is told at length, and its last words."""
    head: TextLine = [(job.name, NAME_STYLE), (f"  {outcome.status}", NOTE_STYLE), f"  see {job.log}"]
    return [head, *([f"  {line}"] for line in outcome.reason.splitlines())]


def table(outcomes: dict[Job, Outcome], objective: str, folder: Path) -> list[TextLine]:
    """The sweep as it stands: the jobs that have finished, best first; those that have not; and where there is more."""
    sign = 1 if lower_is_better(objective) else -1
    values = {job: outcome.objective for job, outcome in outcomes.items() if outcome.objective is not None}
    order = sorted(values, key=lambda job: sign * values[job])
    others = [(job, outcome) for job, outcome in outcomes.items() if job not in values]
    shown = [number(values[job]) for job in order[:MAX_LISTED]]
    width = max(map(len, [objective, *shown]))
    title: TextLine = [(objective.rjust(width), NAME_STYLE), f"  {len(order)} of {len(outcomes)} jobs, best first"]
    best: list[TextLine] = [[text.rjust(width), f"  {job.name}"] for text, job in zip(shown, order, strict=False)]
    more: list[TextLine] = [["more".rjust(width), f"  {len(order) - MAX_LISTED}"]] if len(order) > MAX_LISTED else []
    rest: list[TextLine] = [
        [(outcome.status.rjust(width), NOTE_STYLE), f"  {job.name}  see {job.log}"] for job, outcome in others
    ]
    return [[], title, *best, *more, *rest, [], [f"more:  python -m trainer report {shlex.quote(str(folder))}"]]
