"""Console lines about the jobs of a sweep."""

from __future__ import annotations

import shlex
from pathlib import Path

from trainer.commands.sweep.job import Job, Outcome
from trainer.loggers import higher_is_better
from trainer.loggers.messages import NAME_STYLE, NOTE_STYLE, Span, number

MAX_LISTED = 20  # finished jobs in the table

TextLine = list[Span]


def ended(job: Job, outcome: Outcome, objective: str, seconds: float | None) -> list[TextLine]:
    """Return the lines of a job's outcome: of a failed job its log, and the end of it.

    `seconds` is None if there was nothing left to do.
    """
    took = f"  {number(seconds)} s" if seconds is not None else "  already finished"
    if outcome.objective is not None:
        return [[(job.name, NAME_STYLE), f"  {objective} {number(outcome.objective)}{took}"]]
    if outcome.status == "preempted":
        return [[(job.name, NAME_STYLE), f"  saved and stopped{took}"]]
    head: TextLine = [(job.name, NAME_STYLE), (f"  {outcome.status}", NOTE_STYLE), f"  see {job.log}"]
    return [head, *([f"  {line}"] for line in outcome.reason.splitlines())]


def table(outcomes: dict[Job, Outcome], objective: str, folder: Path) -> list[TextLine]:
    """Return the table of a sweep: finished jobs, best first, then the others."""
    values = {job: outcome.objective for job, outcome in outcomes.items() if outcome.objective is not None}
    order = sorted(values, key=lambda job: values[job], reverse=higher_is_better(objective))
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
