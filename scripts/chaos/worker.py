"""A worker of the trainer that marks its activity: some functions are wrapped, nothing else differs.

`start` launches such workers; the module, run as a script, is one of them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts.chaos.forked import ForkedWorker
from scripts.chaos.marks import Marks

FOLDER = "CHAOS_MARKS"  # where the marks are: one file a rank


def start(tree: dict[str, Any], marks: Path, log: Path, forked: bool, prepare: Callable[[], None]) -> None:
    """Launch the run of a resolved configuration with its output added to `log`, and exit with its exit code.

    Args:
        tree: the configuration.
        marks: the folder of the marks.
        log: the file of the output.
        forked: whether workers are forked from the launcher, which saves them the imports.
        prepare: is called first.
    """
    prepare()
    from trainer.commands.train.launcher import launch
    from trainer.distributed.launch import processes

    if forked:
        setattr(processes, "subprocess", SimpleNamespace(Popen=partial(ForkedWorker, work)))  # noqa: B010 (not a module)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ[FOLDER] = str(marks)
    os._exit(launch(tree, ("-m", "scripts.chaos.worker")))


def work() -> int:
    """Run this worker, and return its exit code."""
    marks = Marks(Path(os.environ[FOLDER]) / os.environ["RANK"])
    marks.begin(os.getpid(), "importing")
    _mark(marks)
    marks.do("starting")
    from trainer.__main__ import run

    return run()


def _mark(marks: Marks) -> None:
    from trainer.algorithms.global_model import GlobalModel
    from trainer.checkpoint import checkpointer
    from trainer.commands.train import worker
    from trainer.distributed import collectives
    from trainer.federation import membership
    from trainer.loop import fit, local_trainer, round

    for owner, name, doing in (
        (worker, "build", "building"),
        (checkpointer.Checkpointer, "latest", "choosing a checkpoint"),
        (fit, "resume", "resuming"),
        (local_trainer.LocalTrainer, "train", "training"),
        (round, "aggregate_round", "combining"),
        (fit, "evaluate", "evaluating"),
        (fit, "_end_round", "ending the round"),
        (collectives, "all_reduce_scalars", "scalars"),
        (GlobalModel, "move", "vectors"),
        (membership.Site, "meet", "meeting"),
        (membership.Coordinator, "gather", "gathering"),
        (membership.Coordinator, "publish", "publishing"),
    ):
        setattr(owner, name, _inside(getattr(owner, name), marks, doing))
    _mark_steps(marks)
    _mark_saves(marks)


def _inside(function: Callable[..., Any], marks: Marks, doing: str) -> Callable[..., Any]:
    def marked(*arguments: Any, **options: Any) -> Any:
        with marks.inside(doing):
            return function(*arguments, **options)

    return marked


def _mark_steps(marks: Marks) -> None:
    from trainer.algorithms.client_result import ClientResult

    add, steps = ClientResult.add, iter(range(1, sys.maxsize))

    def counted(*arguments: Any) -> None:
        add(*arguments)
        marks.count(next(steps))

    setattr(ClientResult, "add", counted)  # noqa: B010 (it is another function)


def _mark_saves(marks: Marks) -> None:
    """Mark the stages of a save: the tensors are written, synced and renamed; then the same with the note."""
    from trainer.checkpoint import checkpointer, resume

    write_part, fsync, rename = checkpointer.write_shard, os.fsync, os.rename
    writing = threading.local()  # the part and its stage, in the thread that writes it

    def at(stage: str, *after: str) -> None:
        if getattr(writing, "stage", "") in after:
            writing.stage = stage
            marks.save(f"{writing.place}: {stage}")

    def mark_part(folder: Path, part: Any, tree: Any) -> None:
        round_folder = next(path for path in (folder, *folder.parents) if resume.ROUND_FOLDER.fullmatch(path.name))
        writing.place = f"{folder.relative_to(round_folder.parent)}/{part.name}"
        writing.stage = "begin"
        at("tensors", "begin")
        write_part(folder, part, tree)
        writing.stage = ""
        marks.save("")

    def mark_sync(descriptor: int) -> None:
        at("sync", "tensors")
        fsync(descriptor)

    def mark_rename(aside: Path, path: Path) -> None:
        rename(aside, path)
        at("whole", "note")
        at("note", "sync")

    checkpointer.write_shard, os.fsync, os.rename = mark_part, mark_sync, mark_rename
    for name in ("_prune_rounds", "_prune_mid_round"):
        setattr(checkpointer.Checkpointer, name, _clearing(getattr(checkpointer.Checkpointer, name), marks))


def _clearing(drop: Callable[..., None], marks: Marks) -> Callable[..., None]:
    def marked(*arguments: Any) -> None:
        marks.save("old ones: removal")
        drop(*arguments)
        marks.save("")

    return marked


if __name__ == "__main__":
    sys.exit(work())
