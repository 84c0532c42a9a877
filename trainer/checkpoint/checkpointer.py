"""The checkpointer: which checkpoints a run keeps, and which rank writes what.

checkpoints/
  round-000012/                      round checkpoint: global model, algorithm, clients' states, progress
    silo-0.replica-0.safetensors     a shard: the ranks of a silo divide what they hold in common
    silo-0.replica-0.json            its manifest: the names of all shards, size and crc32
    silo-1-3f0a9c1e/step-000400/     mid-round checkpoint of silo 1 after 400 steps of the round that follows; the
      replica-0.safetensors, ...     letters are a digest of which silo trains which clients
  round-000013-unevaluated/          a round checkpoint whose round has still to be evaluated
  best                               the name of the round checkpoint with the best validation metric

Silos save in the middle of a round without communication: they exchange nothing there, so any mix of their states is
consistent. See format.py for the files, resume.py for the choice of one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Thread, get_native_id
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.files import write_text
from trainer.checkpoint.format import Shard, Tree, iter_leaves, part_name, unflatten, write_shard
from trainer.checkpoint.resume import (
    BEST,
    IS_INCOMPLETE,
    Inventory,
    ResumePoint,
    find_usable,
    local_inventory,
    merge_inventories,
    mid_round_folders,
    round_folders,
    round_order,
    select_newest,
    step_number,
)
from trainer.checkpoint.shared_storage import SharedStorage
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.utils.disk import naming_disk

log = logging.getLogger(__name__)

NICENESS = 10  # of the writing thread
MID_ROUND_KEPT = 3  # of a silo: when a replica begins its third save, all its peers have ended their first


class Checkpointer:
    """Saves the state of a run by a thread, and finds the checkpoint to resume from.

    Every storage has all that its own ranks resume from. All ranks make a checkpointer together.

    Args:
        folder: the run's `checkpoints`.
        topology: the ranks.
        assignment_digest: returns, for a number of rounds, a digest of which silo then trains which clients; mid-round
            checkpoints with another digest are of no use.
        keep: the number of newest round checkpoints that stay, besides the best.
        storage: the ranks that share the folder; None: all.
        before_save: is called by the writing thread before each save: what a checkpoint counts must be on the disk.

    Attributes:
        stall_seconds: how long training has waited for saves.
    """

    def __init__(
        self,
        folder: Path,
        topology: Topology,
        assignment_digest: Callable[[int], str],
        keep: int = 2,
        storage: SharedStorage | None = None,
        before_save: Callable[[], None] | None = None,
    ):
        self._before_save = before_save or (lambda: None)
        self.folder, self.topology, self.assignment_digest, self.keep = folder, topology, assignment_digest, keep
        self.storage = storage or SharedStorage(tuple(range(topology.world_size)), topology.world_size)
        self.attempt_id = collectives.broadcast_text(uuid.uuid4().hex)
        self.stall_seconds = 0.0
        self._copies: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._resumed_from: set[Path] = set()
        self._rejected: list[str] = []
        self._mid_round: list[Path] = []  # that this start of the run has written, oldest first

    def save_round(
        self,
        name: str,
        replicated: Tree,
        sharded: Tree,
        per_silo: Tree,
        unique: Tree,
        per_rank: Tree,
        all_ranks_write: bool,
        is_best: bool = False,
    ) -> None:
        """Start writing a round checkpoint. Waits for an earlier save, and for the copy out of the model.

        Args:
            name: of its folder.
            replicated: what all ranks with this part of the model hold; those in the first silo on a storage divide it.
            sharded: what the ranks with the same shard of vectors hold; the first of them on a storage writes it.
            per_silo: what the ranks of this silo with this part hold; they divide it.
            unique: what this rank alone holds of its part.
            per_rank: what this rank alone holds.
            all_ranks_write: whether every rank has something to write.
            is_best: whether it is the best so far.
        """
        homes, me = self._ranks_on_storage(), self.topology.rank
        firsts, shard_writers = self._first_copies(homes), self._shard_writers(homes)
        ranks = [rank for rank in homes if all_ranks_write or rank in firsts or rank in shard_writers]
        if me not in ranks:
            return self.wait()
        names = {rank: f"silo-{homes[rank][0]}.replica-{homes[rank][1]}" for rank in ranks}
        tree = self._of_part(self._divide(per_silo, self._peers_with_part())) | self._of_part(dict(iter_leaves(unique)))
        if me in firsts:
            tree |= self._of_part(self._divide(replicated, self._peers_with_part()))
        if me in shard_writers:
            tree |= self._of_part(dict(iter_leaves(sharded)))
        shard = Shard(names[me], tuple(names.values()), self.attempt_id)
        return self._save(self.folder / name, shard, tree | dict(iter_leaves(per_rank)), is_best)

    def _first_copies(self, homes: Mapping[int, tuple[int, int]]) -> set[int]:
        """Return, for each part of the model, the ranks on the storage that have it in the first silo with it there."""
        first_silos: dict[int, int] = {}
        for silo, silo_rank in homes.values():
            first_silos.setdefault(silo_rank % self.topology.num_parts, silo)
        parts = {rank: silo_rank % self.topology.num_parts for rank, (_, silo_rank) in homes.items()}
        return {rank for rank, (silo, _) in homes.items() if silo == first_silos[parts[rank]]}

    def _shard_writers(self, homes: Mapping[int, tuple[int, int]]) -> list[int]:
        """Return the first rank on the storage with each of the shards in which vectors go between the silos."""
        firsts: dict[int, int] = {}
        for rank, (_, silo_rank) in homes.items():
            firsts.setdefault(silo_rank, rank)
        shards = self.topology.num_shards * self.topology.num_parts
        return [rank for silo_rank, rank in firsts.items() if silo_rank < shards]

    def _ranks_on_storage(self) -> dict[int, tuple[int, int]]:
        """Return the silo of each rank that shares the storage, and its rank inside the silo."""
        sizes = self.topology.silo_sizes
        homes = enumerate((silo, silo_rank) for silo, size in enumerate(sizes) for silo_rank in range(size))
        return {rank: home for rank, home in homes if self.storage.is_shared or rank in self.storage.ranks}

    def _peers(self) -> list[int]:
        """Return the ranks inside this silo that share the storage."""
        return [silo_rank for silo, silo_rank in self._ranks_on_storage().values() if silo == self.topology.silo]

    def _peers_with_part(self) -> list[int]:
        """Return those of the peers that have the same part of the model."""
        return [silo_rank for silo_rank in self._peers() if silo_rank % self.topology.num_parts == self.topology.part]

    def _divide(self, tree: Tree, copies: Sequence[int]) -> dict[str, object]:
        """Return the leaves that this rank writes of a tree which all these ranks hold."""
        return assign_leaves(tree, copies.index(self.topology.silo_rank), len(copies))

    def _of_part(self, leaves: Mapping[str, object]) -> dict[str, object]:
        return {f"{part_name(self.topology.part)}/{name}": leaf for name, leaf in leaves.items()}

    def save_mid_round(self, rounds: int, step: int, replicated: Tree, sharded: Tree, per_rank: Tree) -> None:
        """Start writing this silo's mid-round checkpoint. No collective.

        Args:
            rounds: the number of rounds before.
            step: the number of steps that this silo has made of the round.
            replicated: what all ranks of the silo with this part of the model hold; they divide it.
            sharded: this rank's shards of vectors.
            per_rank: what this rank alone holds.
        """
        folder = (
            self.folder / f"round-{rounds:06d}" / self._silo_folder(self.topology.silo, rounds) / f"step-{step:06d}"
        )
        names = tuple(shard_name(peer, self.topology.silo_size, self._peers()) for peer in self._peers())
        mine = shard_name(self.topology.silo_rank, self.topology.silo_size, self._peers())
        tree = self._of_part(self._divide(replicated, self._peers_with_part())) | self._of_part(
            dict(iter_leaves(sharded))
        )
        self._save(folder, Shard(mine, names, self.attempt_id), tree | dict(iter_leaves({"own": per_rank})))

    def take_stall_seconds(self) -> float:
        """Return the seconds that training has waited for saves since the last call."""
        seconds, self.stall_seconds = self.stall_seconds, 0.0
        return seconds

    def wait(self) -> None:
        """Wait until nothing is being written; raise the error of the last save, if it had one."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def latest(self) -> ResumePoint | None:
        """Return the newest complete states whose checksums are right. A collective.

        Returns:
            The states to resume from; None if no save was ever finished.

        Raises:
            ValueError: there are checkpoints, but none that can be used.
        """
        passed: list[str] = []
        while True:
            start = select_newest(self.folder, self._round_names(), partial(self._inventory, passed), passed)
            if not start:
                break
            gathered = collectives.all_gather_texts(json.dumps(self._errors(start)))
            found = [fault for text in gathered for fault in json.loads(text)]
            passed += found
            self._rejected = passed
            if not found:
                self._resumed_from = {saved.folder for saved in start.states}
                return replace(start, rejected=tuple(passed))
        if any(not fault.endswith(IS_INCOMPLETE) for fault in passed):
            listed = "\n  ".join(passed)
            raise ValueError(f"No checkpoint in {self.folder} can be used:\n  {listed}\n  start in another run_dir")
        return None

    def _silo_folder(self, silo: int, rounds: int) -> str:
        return f"silo-{silo}-{self.assignment_digest(rounds)}"

    def _errors(self, resume_point: ResumePoint) -> list[str]:
        """Verify this rank's share of the shards: the ranks that share a storage divide them."""
        share = self.storage.ranks.index(self.topology.rank), len(self.storage.ranks)
        return [fault for saved in resume_point.states for fault in saved.errors(*share)]

    def _round_names(self) -> list[str]:
        """Return the names of the round checkpoints on any storage, newest first. A collective."""
        names = [path.name for path in round_folders(self.folder)]
        there = self._gather_from_storages(names)
        return [
            path.name for path in sorted({Path(name) for each in there for name in each}, key=round_order, reverse=True)
        ]

    def _inventory(self, rejected: list[str], name: str) -> Inventory:
        """Return what all storages hold of a round checkpoint. A collective."""
        silos = sorted({silo for silo, _ in self._ranks_on_storage().values()})
        path = self.folder / name
        mine = local_inventory(path, [self._silo_folder(silo, round_order(path)[0]) for silo in silos], rejected)
        return merge_inventories([Inventory(**each) for each in self._gather_from_storages(asdict(mine))])

    def _gather_from_storages(self, mine: Any) -> list[Any]:
        """Gather a JSON value from the first rank of each storage. A collective."""
        texts = collectives.all_gather_texts(json.dumps(mine) if self.topology.rank == self.storage.first_rank else "")
        return [json.loads(text) for text in texts if text]

    def _save(self, folder: Path, shard: Shard, leaves: Mapping[str, object], is_best: bool = False) -> None:
        began = perf_counter()
        self.wait()
        if folder in self._resumed_from:
            return  # nothing has happened since, and to write over it would put it at risk
        copy = unflatten({name: self._copy(name, leaf) for name, leaf in leaves.items()})
        self._thread = Thread(target=self._write, args=(folder, shard, copy, is_best), daemon=True)
        self._thread.start()
        self.stall_seconds += perf_counter() - began

    def _copy(self, name: str, leaf: object) -> object:
        """Copy a leaf, into the memory of the last save if possible: new memory takes three times as long."""
        if not isinstance(leaf, Tensor):
            return leaf
        last = self._copies.get(name)
        if last is None or last.shape != leaf.shape or last.dtype != leaf.dtype:
            last = self._copies[name] = torch.empty(leaf.shape, dtype=leaf.dtype)
        return last.copy_(leaf.detach())

    def _write(self, folder: Path, shard: Shard, tree: Tree, is_best: bool) -> None:
        _lower_priority()
        began = perf_counter()
        try:
            self._before_save()
            with naming_disk(self.folder):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds states of clients
            write_shard(folder, shard, tree)
            name = folder.relative_to(self.folder)
            log.info("checkpoint %s written in %.3f s: %s", name, perf_counter() - began, shard.name)
            self._rejected = [fault for fault in self._rejected if f"{folder}/" not in fault]
            if folder.parent == self.folder:
                if is_best and self.topology.rank == self.storage.first_rank:
                    with naming_disk(self.folder):
                        write_text(self.folder / BEST, folder.name)
                if self.topology.rank == self.storage.first_rank:
                    self._prune_rounds(folder)
            else:
                self._prune_mid_round(folder, shard)
        except Exception as error:  # raised by the main thread, when it waits
            if not (isinstance(error, FileNotFoundError) and self._is_obsolete(folder)):
                self._failure = error

    def _prune_rounds(self, newest: Path) -> None:
        # Later ones, of an earlier start, are damaged: this start would have resumed from them.
        there = [path for path in reversed(round_folders(self.folder)) if round_order(path) <= round_order(newest)]
        # The newest is looked at first: when it is whole, no rank still writes an older one.
        whole = [path for path in there if find_usable(path, self._rejected)]
        best = self.folder / BEST
        kept = {path.name for path in whole[: self.keep]} | (
            {best.read_text(errors="replace")} if best.exists() else set()
        )
        for old in there:
            if whole and round_order(old) < round_order(whole[0]):
                for unneeded in old.glob("silo-*/") if old.name in kept else [old]:
                    shutil.rmtree(unneeded, ignore_errors=True)

    def _prune_mid_round(self, newest: Path, shard: Shard) -> None:
        self._mid_round = [path for path in self._mid_round if path.parent == newest.parent] + [newest]
        if len(self._mid_round) < MID_ROUND_KEPT:
            return  # what the run has resumed from is needed until then
        for old in set(mid_round_folders(newest.parent)) - set(self._mid_round[-MID_ROUND_KEPT:]):
            for path in old.glob(f"{shard.name}.*"):
                path.unlink(missing_ok=True)
            if step_number(old) < step_number(newest):  # a peer may just have made a later one
                with suppress(OSError):  # it is not empty, or a peer was quicker
                    old.rmdir()

    def _is_obsolete(self, folder: Path) -> bool:
        """Return whether a newer round checkpoint is complete, so that rank 0 may have removed this one meanwhile."""
        border = folder.parent.parent
        return border.parent == self.folder and any(
            round_order(path) > round_order(border) and find_usable(path, self._rejected)
            for path in round_folders(self.folder)
        )


def _lower_priority() -> None:
    """Give way to the training, where the system has a priority for each thread."""
    if sys.platform == "linux":
        thread = get_native_id()
        # Only root may raise it again, if the whole run has a lower one.
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def shard_name(silo_rank: int, silo_size: int, peers: Sequence[int]) -> str:
    """Return the name of a rank's shard; if the ranks of its silo are on several storages, it has their number."""
    return f"replica-{silo_rank}" + (f"-of-{silo_size}" if len(peers) < silo_size else "")


def assign_leaves(tree: Tree, index: int, count: int) -> dict[str, object]:
    """Return the leaves that one of some ranks writes of a tree which all hold: largest first, to the least loaded."""
    loads = [0] * count
    mine = {}
    for name, leaf in sorted(iter_leaves(tree), key=lambda item: (-_num_bytes(item[1]), item[0])):
        least = loads.index(min(loads))
        loads[least] += _num_bytes(leaf) + 1
        if least == index:
            mine[name] = leaf
    return mine


def _num_bytes(leaf: object) -> int:
    return leaf.nbytes if isinstance(leaf, Tensor) else 0
