"""Checkpoints to look into and to damage: ranks that are not there, files with other contents, trees compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.distributed.topology import Topology

LAYOUT = "3f0a9c1e"  # the same silos train the same clients in every round


def writers(folder: Path, sizes: Sequence[int] = (1,), keep: int = 2) -> list[Checkpointer]:
    """The Checkpointer of all ranks of silos of these sizes, of one attempt, in rank order.

    All of them live in this process, which is a world of its own: each reads alone what the others have written.
    """
    made: list[Checkpointer] = []
    for silo, size in enumerate(sizes):
        for replica in range(size):
            place = Topology(len(made), 1, silo, replica, tuple(sizes), torch.device("cpu"), None, None)
            made.append(Checkpointer(folder, place, lambda rounds: LAYOUT, keep))
            made[-1].attempt_id = made[0].attempt_id
    return made


def border_name(rounds: int, is_evaluated: bool = True) -> str:
    """The folder of the border after so many rounds."""
    return f"round-{rounds:06d}" + ("" if is_evaluated else "-unevaluated")


def section_name(silo: int, rounds: int, step: int) -> str:
    """The folder of a silo's section inside the round after so many, at this step."""
    return f"{border_name(rounds)}/silo-{silo}-{LAYOUT}/step-{step:06d}"


def save_border(ranks: Sequence[Checkpointer], rounds: int, is_evaluated: bool = True, is_best: bool = False) -> None:
    """Writes a border, rank after rank."""
    for one in ranks:
        common = {"model": {"weight": torch.full((4,), rounds)}, "progress": {"rounds": rounds}}
        one.save_round(border_name(rounds, is_evaluated), common, {}, {}, {}, True, is_best)
        one.wait()


def save_section(ranks: Sequence[Checkpointer], silo: int, rounds: int, step: int) -> None:
    """Writes a section, replica after replica of the silo."""
    for one in ranks:
        if one.topology.silo == silo:
            one.save_mid_round(rounds, step, {"model": {"weight": torch.full((4,), step)}}, {}, {"silo": silo})
            one.wait()


def steps_of(resume_point: ResumePoint | None) -> tuple[str, dict[int, int]]:
    """What is gone on from: the border's name, empty if it is none, and by silo the steps that are saved."""
    assert resume_point is not None
    steps = {silo: int(saved.folder.name.removeprefix("step-")) for silo, saved in resume_point.mid_round.items()}
    return resume_point.round_checkpoint.folder.name if resume_point.round_checkpoint else "", steps


@contextmanager
def content(path: Path, other: bytes | None) -> Iterator[None]:
    """The file with another content, or no file, as long as the block lasts."""
    own = path.read_bytes()
    if other is None:
        path.unlink()
    else:
        path.write_bytes(other)
    try:
        yield
    finally:
        path.write_bytes(own)


def flipped(own: bytes, place: int, bit: int) -> bytes:
    """The bytes with one bit the other way round."""
    damaged = bytearray(own)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def assert_trees_equal(ours: Any, theirs: Any) -> None:
    """Fails unless both have the same names, with leaves of the same type, shape and bits."""
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
