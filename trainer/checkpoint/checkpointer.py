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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread, get_native_id
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.format import Part, Tree, leaves_of, tree_of, write_part, write_text
from trainer.checkpoint.resume import (
    NOT_WHOLE,
    Holding,
    Start,
    borders,
    choose,
    held,
    order,
    start_of,
    step_of,
    steps,
    together,
    usable,
)
from trainer.checkpoint.shared_storage import Disk
from trainer.distributed import collectives
from trainer.distributed.topology import Topology

NICENESS = 10  # of the writing thread
SECTIONS_KEPT = 3  # of a silo: when a replica begins its third save, all its peers have ended their first


class Checkpoints:
    """The checkpoints in a folder: written by a thread, read at the start. All ranks make one, together.

    The newest `keep` borders stay, and the best. `layout` is a word for who trains whom after so many rounds: sections
    of another one are of no use. `disk` says who shares the folder, all if it is None: on each disk there is all that
    its own ranks go on from. `stall_seconds` is how long training has waited for saves.
    """

    def __init__(
        self, folder: Path, topology: Topology, layout: Callable[[int], str], keep: int = 2, disk: Disk | None = None
    ):
        self.folder, self.topology, self.layout, self.keep = folder, topology, layout, keep
        self.disk = disk or Disk(tuple(range(topology.world_size)), topology.world_size)
        self.attempt = collectives.broadcast_text(uuid.uuid4().hex)
        self.stall_seconds = 0.0
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._gone_on_from: set[Path] = set()
        self._passed: list[str] = []
        self._sections: list[Path] = []  # that this start of the run has written, oldest first

    def save_border(
        self, name: str, everyones: Tree, slices: Tree, silos: Tree, own: Tree, all_write: bool, is_best: bool = False
    ) -> None:
        """Begins to write a border; waits only for an earlier save and the copy out of the model.

        everyones  what all ranks hold: the replicas of the first silo on the disk divide it
        slices     what the ranks with this one's slice hold: the first of them on the disk writes it
        silos      what the replicas of this silo hold: they divide it
        own        what this rank alone holds
        all_write  whether every rank has something to bring
        """
        homes, me = self._homes(), self.topology.rank
        first_silo, slice_writers = homes[self.disk.first][0], self._slice_writers(homes)
        ranks = [rank for rank in homes if all_write or homes[rank][0] == first_silo or rank in slice_writers]
        if me not in ranks:
            return self.wait()
        parts = {rank: f"silo-{homes[rank][0]}.replica-{homes[rank][1]}" for rank in ranks}
        tree = self._my_share(silos) | dict(leaves_of(own))
        if homes[me][0] == first_silo:
            tree |= self._my_share(everyones)
        if me in slice_writers:
            tree |= dict(leaves_of(slices))
        return self._save(self.folder / name, Part(parts[me], tuple(parts.values()), self.attempt), tree, is_best)

    def _slice_writers(self, homes: Mapping[int, tuple[int, int]]) -> list[int]:
        """The first rank on the disk with each of the slices in which vectors go between the silos."""
        firsts: dict[int, int] = {}
        for rank, (_, replica) in homes.items():
            firsts.setdefault(replica, rank)
        return [rank for replica, rank in firsts.items() if replica < self.topology.num_slices]

    def _homes(self) -> dict[int, tuple[int, int]]:
        """The silo and the replica of each rank that shares the disk."""
        sizes = self.topology.silo_sizes
        homes = enumerate((silo, replica) for silo, size in enumerate(sizes) for replica in range(size))
        return {rank: home for rank, home in homes if self.disk.is_shared or rank in self.disk.ranks}

    def _peers(self) -> list[int]:
        """The replicas of this silo that share the disk."""
        return [replica for silo, replica in self._homes().values() if silo == self.topology.silo]

    def _my_share(self, tree: Tree) -> dict[str, object]:
        """What this replica writes of what all replicas of the silo hold."""
        peers = self._peers()
        return share_of(tree, peers.index(self.topology.replica), len(peers))

    def save_section(self, rounds: int, step: int, common: Tree, slices: Tree, own: Tree) -> None:
        """Begins to write this silo's section of the round, after so many of its steps. No collective.

        The replicas divide what is common to them; each writes its slice, and what is its own.
        """
        folder = self.folder / f"round-{rounds:06d}" / self._silo(self.topology.silo, rounds) / f"step-{step:06d}"
        parts = tuple(part_of(replica, self.topology.num_replicas, self._peers()) for replica in self._peers())
        mine = part_of(self.topology.replica, self.topology.num_replicas, self._peers())
        tree = self._my_share(common) | dict(leaves_of(slices)) | dict(leaves_of({"own": own}))
        self._save(folder, Part(mine, parts, self.attempt), tree)

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
            choice = choose(self.folder, self._names(), partial(self._look, passed), passed)
            if not choice:
                break
            start = start_of(self.folder, choice)
            told = collectives.gather_texts("\n".join(self._faults(start)))
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
        """What this rank finds damaged: those that share the disk divide the parts on it."""
        share = self.disk.ranks.index(self.topology.rank), len(self.disk.ranks)
        return [fault for saved in start.saved for fault in saved.faults(*share)]

    def _names(self) -> list[str]:
        """The names of the borders on any of the disks, newest first. A collective."""
        names = [path.name for path in borders(self.folder)]
        there = self._of_disks(names)
        return [path.name for path in sorted({Path(name) for each in there for name in each}, key=order, reverse=True)]

    def _look(self, passed: list[str], name: str) -> Holding:
        """What all disks hold of a border. A collective."""
        silos = sorted({silo for silo, _ in self._homes().values()})
        path = self.folder / name
        mine = held(path, [self._silo(silo, order(path)[0]) for silo in silos], passed)
        return together([Holding(**each) for each in self._of_disks(asdict(mine))])

    def _of_disks(self, mine: Any) -> list[Any]:
        """What the first rank of each disk says, as JSON can say it."""
        texts = collectives.gather_texts(json.dumps(mine) if self.topology.rank == self.disk.first else "")
        return [json.loads(text) for text in texts if text]

    def _save(self, folder: Path, part: Part, leaves: Mapping[str, object], is_best: bool = False) -> None:
        began = perf_counter()
        self.wait()
        if folder in self._gone_on_from:
            return  # nothing has happened since, and to write over it would put it at risk
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
                if is_best and self.topology.rank == self.disk.first:
                    write_text(self.folder / "best", folder.name)
                if self.topology.rank == self.disk.first:
                    self._drop_old_borders(folder)
            else:
                self._drop_old_sections(folder, part)
        except Exception as error:  # said by the main thread, when it waits
            if not (isinstance(error, FileNotFoundError) and self._is_dropped(folder)):
                self._failure = error

    def _drop_old_borders(self, newest: Path) -> None:
        # Later ones, of an earlier start, are damaged: this one would have gone on from them.
        there = [path for path in reversed(borders(self.folder)) if order(path) <= order(newest)]
        # The newest is looked at first: when it is whole, no rank still writes an older one.
        whole = [path for path in there if usable(path, self._passed)]
        best = self.folder / "best"
        kept = {path.name for path in whole[: self.keep]} | ({best.read_text()} if best.exists() else set())
        for old in there:
            if whole and order(old) < order(whole[0]):
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


def part_of(replica: int, num_replicas: int, peers: Sequence[int]) -> str:
    """The name of a replica's part of a section. Where its peers are on several disks, it says how many they are."""
    return f"replica-{replica}" + (f"-of-{num_replicas}" if len(peers) < num_replicas else "")


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
