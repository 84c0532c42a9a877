"""A job of a sweep: its name, its run folder, and what became of it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree
from trainer.distributed.launch.subprocesses import PROMPT
from trainer.loggers import higher_is_better

LONGEST_NAME = 120  # file systems take 255 bytes, and people fewer
MAX_LOG_TAIL_LINES = 3
PLAIN = r"[\w.-]*/[\w./-]*|[A-Za-z][\w.-]*"  # texts that Hydra takes for nothing else, but for some words
WORDS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Outcome:
    """How a job stands: as state.json says, or before there is one `waiting` or `failed`; and its objective."""

    status: str
    objective: float | None = None
    reason: str = ""

    @property
    def is_finished(self) -> bool:
        return self.status == "finished" and not self.reason


@dataclass(frozen=True)
class Job:
    """One run of a sweep. The same overrides in the same sweep folder are the same job, whoever runs it and when.

    overrides: all that the job sets. sweep: the folder of the sweep. name: made of what the sweep varies.
    """

    overrides: tuple[str, ...]
    sweep: Path
    name: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.sweep / self.name

    @property
    def log(self) -> Path:
        """Where its output goes; locked while it runs."""
        return self.log_of(0)

    def log_of(self, rank: int) -> Path:
        """The log of one of several processes that run the job together."""
        folder = self.sweep / "logs"
        return (folder / f"rank-{rank}" if rank else folder) / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """What runs it by hand: `python -m trainer` with these."""
        return [*self.overrides, assign("run_dir", str(self.folder))]

    def has_finished(self) -> bool:
        """Whether there is nothing left to do."""
        folder = RunDir(self.folder)
        return folder.status() == "finished" and folder.has_finished(compose_tree(self.arguments)["rounds"])

    def outcome(self, objective: str) -> Outcome:
        """What its files say."""
        folder = RunDir(self.folder)
        state = folder.state()
        status = state.get("status", "failed" if self.log.exists() else "waiting")
        if status != "finished":
            return Outcome(status, reason=state.get("error") or self.log_tail())
        value = folder.result().get(objective, math.nan)
        if math.isfinite(value):
            return Outcome(status, value)
        return Outcome(status, reason=f"{objective} is no number in {self.folder / 'result.json'}")

    def log_tail(self) -> str:
        """The end of its log, of the last time that it was begun."""
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = said.rpartition(PROMPT)[2].splitlines()[1:]
        return "\n".join([line for line in lines if line.strip()][-MAX_LOG_TAIL_LINES:])


def find_jobs(sweep: Path) -> tuple[Job, ...]:
    """The jobs that were begun in this folder."""
    return tuple(Job((), sweep, path.stem) for path in sorted((sweep / "logs").glob("*.log")))


def make_job(overrides: Sequence[str], sweep: Path, constant: Collection[str]) -> Job:
    """The job of these overrides; `constant` are the keys that are the same in all jobs of the sweep."""
    kept = tuple(override for override in overrides if key_of(override) != "run_dir")
    return Job(kept, sweep, job_name([override for override in kept if key_of(override) not in constant]))


def job_name(overrides: Sequence[str]) -> str:
    """What the overrides say, safe as a file name. Where a character had to go, a hash keeps names apart.

    >>> job_name(["optimizer.lr=0.1", "seed=2"]), job_name(["silos=[3,1]"]), job_name([])
    ('optimizer.lr=0.1,seed=2', 'silos=3,1-af90073c', 'run')
    """
    said = ",".join(overrides) or "run"
    safe = re.sub(r"[^\w.=,+-]+", "-", re.sub(r"[\[\]{}()'\"\\ ]", "", said), flags=re.ASCII).lstrip(".-")
    if safe == said and len(safe) <= LONGEST_NAME:
        return safe
    digest = hashlib.blake2b(said.encode(), digest_size=4).hexdigest()
    return f"{safe[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def key_of(override: str) -> str:
    """The key that an override sets, with the sign before it."""
    return override.partition("=")[0]


def assign(key: str, text: str) -> str:
    """The override that gives a key this text, whatever is in it."""
    if re.fullmatch(PLAIN, text, re.ASCII) and text.lower() not in WORDS:
        return f"{key}={text}"
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)  # at the end they stand before the closing quote
    return f'{key}="{escaped}"'


def lower_is_better(objective: str) -> bool:
    """Whether the smaller of two such figures is the better one."""
    return not higher_is_better(objective)
