"""Checkpoints of simulated ranks, damage to files, and the comparison of trees."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.checkpoint.run_lock import RunLock
from trainer.distributed.topology import Topology

SECONDS_TO_START = 10
LAYOUT = "3f0a9c1e"  # the same silos train the same clients in every round


def writers(folder: Path, sizes: Sequence[int] = (1,), keep: int = 2) -> list[Checkpointer]:
    """Return the Checkpointer of each rank of silos of these sizes, in rank order.

    All of them are in this process, which is a world of one: each reads the files of the others by itself.
    """
    made: list[Checkpointer] = []
    for silo, size in enumerate(sizes):
        for replica in range(size):
            topology = Topology(len(made), 1, silo, replica, tuple(sizes), torch.device("cpu"), None, None)
            made.append(Checkpointer(folder, topology, lambda rounds: LAYOUT, keep))
            made[-1].attempt_id = made[0].attempt_id
    return made


def round_name(rounds: int, is_evaluated: bool = True) -> str:
    """Return the name of the checkpoint after this number of rounds."""
    return f"round-{rounds:06d}" + ("" if is_evaluated else "-unevaluated")


def mid_round_name(silo: int, rounds: int, step: int) -> str:
    """Return the name of a silo's mid-round checkpoint after this number of rounds, at this step."""
    return f"{round_name(rounds)}/silo-{silo}-{LAYOUT}/step-{step:06d}"


def save_round(ranks: Sequence[Checkpointer], rounds: int, is_evaluated: bool = True, is_best: bool = False) -> None:
    """Write a round checkpoint, rank after rank."""
    for one in ranks:
        common = {"model": {"weight": torch.full((4,), rounds)}, "progress": {"rounds": rounds}}
        one.save_round(round_name(rounds, is_evaluated), common, {}, {}, {}, {}, True, is_best)
        one.wait()


def save_mid_round_checkpoint(ranks: Sequence[Checkpointer], silo: int, rounds: int, step: int) -> None:
    """Write a mid-round checkpoint, replica after replica of the silo."""
    for one in ranks:
        if one.topology.silo == silo:
            one.save_mid_round(rounds, step, {"model": {"weight": torch.full((4,), step)}}, {}, {"silo": silo})
            one.wait()


def steps_of(resume_point: ResumePoint | None) -> tuple[str, dict[int, int]]:
    """Return the name of the round checkpoint, empty if there is none, and the saved step of each silo."""
    assert resume_point is not None
    steps = {silo: int(saved.folder.name.removeprefix("step-")) for silo, saved in resume_point.mid_round.items()}
    return resume_point.round_checkpoint.folder.name if resume_point.round_checkpoint else "", steps


def fill_disk(folder: Path) -> Path:
    """Write a file into a folder until its disk is full; return the file."""
    path = folder / "other"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


@contextmanager
def content(path: Path, other: bytes | None) -> Iterator[None]:
    """Replace the content of a file, or remove it, until the block is left."""
    own = path.read_bytes()
    if other is None:
        path.unlink()
    else:
        path.write_bytes(other)
    try:
        yield
    finally:
        path.write_bytes(own)


@contextmanager
def other_owner(folder: Path) -> Iterator[BaseProcess]:
    """Another process of this machine owns the run folder until the block is left."""
    context = multiprocessing.get_context("fork")
    owns = context.Event()

    def own() -> None:
        RunLock(folder).acquire()
        owns.set()
        time.sleep(60)

    process = context.Process(target=own)
    process.start()
    try:
        assert owns.wait(SECONDS_TO_START)
        yield process
    finally:
        process.kill()
        process.join()


def flipped(own: bytes, place: int, bit: int) -> bytes:
    """Return the bytes with one bit flipped."""
    damaged = bytearray(own)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def assert_trees_equal(ours: Any, theirs: Any) -> None:
    """Assert that two trees have the same names, and leaves of the same type, shape and bits."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for name in theirs:
            assert_trees_equal(ours[name], theirs[name])
    elif isinstance(theirs, Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(_bits(ours), _bits(theirs))
    else:
        assert ours == theirs and type(ours) is type(theirs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
