"""The checkpoints of a run: what is kept where, and who writes when. start.py says what a run goes on from.

checkpoints/
  round-000012/                      the border after 12 rounds: the global model, algorithm, clients' states, progress
    silo-0.replica-0.safetensors     a part: replicas divide what they hold in common
    silo-0.replica-0.json            its note: the names of all parts, size and crc32
    silo-1-3f0a9c1e/step-000400/     inside the round that follows: all of silo 1 after 400 of its steps; the letters
      replica-0.safetensors, ...     stand for which silo trains which clients
  round-000013-unevaluated/          a border whose round has still to be evaluated
  best                               the name of the border with the best validation metric

Silos save inside a round without a word to each other: nothing is exchanged there, so any mix of their states is
consistent. See parts.py for the files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread, get_native_id
from time import perf_counter

import torch
from torch import Tensor

from trainer import comm
from trainer.parts import Part, Tree, leaves_of, tree_of, write_part, write_text
from trainer.start import NOT_WHOLE, Start, borders, choose, order, start_of, step_of, steps, usable
from trainer.topology import Topology

NICENESS = 10  # of the writing thread
SECTIONS_KEPT = 3  # of a silo: when a replica begins its third save, all its peers have ended their first


class Checkpoints:
    """The checkpoints in a folder: written by a thread, read at the start. All ranks make one, together.

    The newest `keep` borders stay, and the best. `layout` is a word for who trains whom after so many rounds: sections
    of another one are of no use. `stall_seconds` is how long training has waited for saves.
    """

    def __init__(self, folder: Path, topology: Topology, layout: Callable[[int], str], keep: int = 2):
        self.folder, self.topology, self.layout, self.keep = folder, topology, layout, keep
        self.attempt = comm.broadcast_text(uuid.uuid4().hex)
        self.stall_seconds = 0.0
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._gone_on_from: set[Path] = set()
        self._passed: list[str] = []
        self._sections: list[Path] = []  # that this start of the run has written, oldest first

    def save_border(self, name: str, common: Tree, own: Tree, all_write: bool, is_best: bool = False) -> None:
        """Begins to write a border; waits only for an earlier save and the copy out of the model.

        The replicas of a silo divide what they hold in common. `all_write`: every silo has something to bring, else
        silo 0 alone.
        """
        silos = enumerate(self.topology.silo_sizes if all_write else self.topology.silo_sizes[:1])
        parts = tuple(f"silo-{silo}.replica-{replica}" for silo, size in silos for replica in range(size))
        part = Part(f"silo-{self.topology.silo}.replica-{self.topology.replica}", parts, self.attempt)
        if part.name in parts:
            self._save(self.folder / name, part, common, own, is_best)
        else:
            self.wait()

    def save_section(self, rounds: int, step: int, common: Tree, own: Tree) -> None:
        """Begins to write this silo's section of the round, after so many of its steps. No collective."""
        parts = tuple(f"replica-{replica}" for replica in range(self.topology.num_replicas))
        folder = self.folder / f"round-{rounds:06d}" / self._silo(self.topology.silo, rounds) / f"step-{step:06d}"
        self._save(folder, Part(f"replica-{self.topology.replica}", parts, self.attempt), common, own)

    def take_stall(self) -> float:
        """The seconds that training has waited for saves since this was last asked."""
        seconds, self.stall_seconds = self.stall_seconds, 0.0
        return seconds

    def wait(self) -> None:
        """Returns when nothing is being written; raises what went wrong with the last save."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def newest(self) -> Start | None:
        """What to go on from: the newest whole states whose checksums are right. A collective.

        None when none was ever finished; ValueError when there are some, but none that can be used.
        """
        passed: list[str] = []
        while True:
            choice, passed = json.loads(comm.broadcast_text(self._choice(passed) if self.topology.rank == 0 else ""))
            if not choice:
                break
            start = start_of(self.folder, choice)
            told = comm.gather_texts("\n".join(self._faults(start)))
            found = [fault for text in told for fault in text.splitlines()]
            passed += found
            self._passed = passed
            if not found:
                self._gone_on_from = {saved.folder for saved in start.saved}
                return Start(start.rounds, start.border, start.sections, tuple(passed))
        if any(not fault.endswith(NOT_WHOLE) for fault in passed):
            listed = "\n  ".join(passed)
            raise ValueError(f"No checkpoint in {self.folder} can be used:\n  {listed}\n  start in another run_dir")
        return None

    def _silo(self, silo: int, rounds: int) -> str:
        return f"silo-{silo}-{self.layout(rounds)}"

    def _faults(self, start: Start) -> list[str]:
        rank, world = self.topology.rank, self.topology.world_size
        return [fault for saved in start.saved for fault in saved.faults(rank, world)]

    def _choice(self, passed: list[str]) -> str:
        def silos(rounds: int) -> list[str]:
            return [self._silo(silo, rounds) for silo in range(self.topology.num_silos)]

        return json.dumps([choose(self.folder, silos, passed), passed])

    def _save(self, folder: Path, part: Part, common: Tree, own: Tree, is_best: bool = False) -> None:
        began = perf_counter()
        self.wait()
        if folder in self._gone_on_from:
            return  # nothing has happened since, and to write over it would put it at risk
        share = share_of(common, self.topology.replica, self.topology.num_replicas)
        leaves = {**share, **dict(leaves_of({"own": own}))}
        copy = tree_of({name: self._copy(name, leaf) for name, leaf in leaves.items()})
        self._thread = Thread(target=self._write, args=(folder, part, copy, is_best), daemon=True)
        self._thread.start()
        self.stall_seconds += perf_counter() - began

    def _copy(self, name: str, leaf: object) -> object:
        """The leaf as it is now, in the memory of the last save if that had one like it: new memory costs thrice."""
        if not isinstance(leaf, Tensor):
            return leaf
        last = self._copies.get(name)
        if last is None or last.shape != leaf.shape or last.dtype != leaf.dtype:
            last = self._copies[name] = torch.empty(leaf.shape, dtype=leaf.dtype)
        return last.copy_(leaf.detach())

    def _write(self, folder: Path, part: Part, tree: Tree, is_best: bool) -> None:
        _give_way()
        try:
            write_part(folder, part, tree)
            self._passed = [fault for fault in self._passed if f"{folder}/" not in fault]
            if folder.parent == self.folder:
                if is_best and self.topology.rank == 0:
                    write_text(self.folder / "best", folder.name)
                if self.topology.rank == 0:
                    self._drop_old_borders(folder)
            else:
                self._drop_old_sections(folder, part)
        except Exception as error:  # said by the main thread, when it waits
            if not (isinstance(error, FileNotFoundError) and self._is_dropped(folder)):
                self._failure = error

    def _drop_old_borders(self, newest: Path) -> None:
        # Later ones, of an earlier start, are damaged: this one would have gone on from them.
        earlier = [path for path in borders(self.folder) if order(path) <= order(newest)]
        whole = [path for path in earlier if usable(path, self._passed)]
        best = self.folder / "best"
        kept = {path.name for path in whole[-self.keep :]} | ({best.read_text()} if best.exists() else set())
        for old in borders(self.folder):
            if whole and order(old) < order(whole[-1]):
                for unneeded in old.glob("silo-*/") if old.name in kept else [old]:
                    shutil.rmtree(unneeded, ignore_errors=True)

    def _drop_old_sections(self, newest: Path, part: Part) -> None:
        self._sections = [path for path in self._sections if path.parent == newest.parent] + [newest]
        if len(self._sections) < SECTIONS_KEPT:
            return  # what the run has gone on from is needed until then
        for old in set(steps(newest.parent)) - set(self._sections[-SECTIONS_KEPT:]):
            for path in old.glob(f"{part.name}.*"):
                path.unlink(missing_ok=True)
            if step_of(old) < step_of(newest):  # a peer may just have made a later one
                with suppress(OSError):  # it is not empty, or a peer was quicker
                    old.rmdir()

    def _is_dropped(self, folder: Path) -> bool:
        """Whether this is a section that nobody needs, a newer border being whole: rank 0 may drop it meanwhile."""
        border = folder.parent.parent
        return border.parent == self.folder and any(
            order(path) > order(border) and usable(path, self._passed) for path in borders(self.folder)
        )


def _give_way() -> None:
    """Lets this thread run where the training waits, as far as the system has a priority for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), NICENESS)


def share_of(tree: Tree, replica: int, num_replicas: int) -> dict[str, object]:
    """The leaves that this replica writes of what all replicas hold: the largest first, each to the least loaded."""
    loads = [0] * num_replicas
    mine = {}
    for name, leaf in sorted(leaves_of(tree), key=lambda item: (-_bytes(item[1]), item[0])):
        least = loads.index(min(loads))
        loads[least] += _bytes(leaf) + 1
        if least == replica:
            mine[name] = leaf
    return mine


def _bytes(leaf: object) -> int:
    return leaf.nbytes if isinstance(leaf, Tensor) else 0
