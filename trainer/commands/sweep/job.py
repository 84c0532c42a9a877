"""A job of a sweep: its name, run folder and outcome."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree
from trainer.config.overrides import literal
from trainer.distributed.launch.subprocesses import log_tail

MAX_NAME_LENGTH = 120  # file systems take 255 bytes
MAX_LOG_TAIL_LINES = 3
PLAIN = r"[\w.-]*/[\w./-]*|[A-Za-z][\w.-]*"  # texts that Hydra reads as strings, except for some words
WORDS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job: its status, and its objective or the reason for none.

    The status is that of state.json; without it, `waiting` or `failed`.
    """

    status: str
    objective: float | None = None
    reason: str = ""

    @property
    def is_finished(self) -> bool:
        return self.status == "finished" and not self.reason


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    The same overrides in the same sweep folder are the same job.

    Attributes:
        overrides: of the run, without `run_dir`.
        sweep: folder of the sweep.
        name: made of the overrides that the sweep varies.
    """

    overrides: tuple[str, ...]
    sweep: Path
    name: str

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.sweep / self.name

    @property
    def log(self) -> Path:
        """File for its output; locked while it runs."""
        return self.log_of(0)

    def log_of(self, rank: int) -> Path:
        """Return the log of one of several processes that run the job together."""
        folder = self.sweep / "logs"
        return (folder / f"rank-{rank}" if rank else folder) / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """Arguments of `python -m trainer` that run it."""
        return [*self.overrides, assign("run_dir", str(self.folder))]

    def has_finished(self) -> bool:
        """Return whether it has finished all its rounds."""
        folder = RunDir(self.folder)
        return folder.status() == "finished" and folder.has_finished(compose_tree(self.arguments)["rounds"])

    def outcome(self, objective: str) -> Outcome:
        """Return the outcome that its files record."""
        folder = RunDir(self.folder)
        state = folder.state()
        status = state.get("status", "failed" if self.log.exists() else "waiting")
        if status != "finished":
            return Outcome(status, reason=state.get("error") or self.log_tail())
        value = folder.result().get(objective, math.nan)
        if math.isfinite(value):
            return Outcome(status, value)
        return Outcome(status, reason=f"{objective} is not a finite number in {self.folder / 'result.json'}")

    def log_tail(self) -> str:
        """Return the last lines of its log, since its last start."""
        return log_tail(self.log, MAX_LOG_TAIL_LINES)


def find_jobs(sweep: Path) -> tuple[Job, ...]:
    """Return the jobs that were started in this sweep folder."""
    return tuple(Job((), sweep, path.stem) for path in sorted((sweep / "logs").glob("*.log")))


def make_job(overrides: Sequence[str], sweep: Path, constant: Collection[str]) -> Job:
    """Return the job of these overrides.

    `constant` are the keys that are the same in all jobs of the sweep.
    """
    kept = tuple(override for override in overrides if key_of(override) != "run_dir")
    return Job(kept, sweep, job_name([override for override in kept if key_of(override) not in constant]))


def job_name(overrides: Sequence[str]) -> str:
    """Return a file name made of overrides, with a hash where characters are removed.

    >>> job_name(["optimizer.lr=0.1", "seed=2"]), job_name(["silos=[3,1]"]), job_name([])
    ('optimizer.lr=0.1,seed=2', 'silos=3,1-af90073c', 'run')
    """
    text = ",".join(overrides) or "run"
    safe = re.sub(r"[^\w.=,+-]+", "-", re.sub(r"[\[\]{}()'\"\\ ]", "", text), flags=re.ASCII).lstrip(".-")
    if safe == text and len(safe) <= MAX_NAME_LENGTH:
        return safe
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{safe[: MAX_NAME_LENGTH - len(digest) - 1]}-{digest}"


def key_of(override: str) -> str:
    """Return the key that an override sets, with its prefix."""
    return override.partition("=")[0]


def assign(key: str, text: str) -> str:
    """Return the override that sets a key to a text, quoted where needed."""
    is_plain = re.fullmatch(PLAIN, text, re.ASCII) and text.lower() not in WORDS
    return f"{key}={text if is_plain else literal(text)}"
