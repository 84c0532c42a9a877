"""The checkpoints of a run: what is kept where, what a run goes on from, and who writes when.

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
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from time import perf_counter

import torch
from torch import Tensor

from trainer import comm
from trainer.parts import Part, Saved, Tree, damaged_notes, find, leaves_of, tree_of, write_part, write_text
from trainer.topology import Topology

BORDER = re.compile(r"round-(\d{6,})(-unevaluated)?")
NOT_WHOLE = "is not whole"  # what is said of a save that did not come to its end
SECTIONS_KEPT = 3  # of a silo: when a replica begins its third save, all its peers have ended their first

log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Start:
    """What a run goes on from: a border, and inside the round after it, the sections of some silos.

    border    None only if all silos have sections
    sections  by silo
    passed    why newer ones cannot be used, as sentences
    """

    rounds: int
    border: Saved | None = None
    sections: Mapping[int, Saved] = field(default_factory=dict)
    passed: tuple[str, ...] = ()

    @property
    def saved(self) -> list[Saved]:
        return [*filter(None, [self.border]), *self.sections.values()]

    @property
    def reported(self) -> int:
        """The rounds whose figures have been given to the sinks."""
        unevaluated = self.border is not None and self.border.folder.name.endswith("-unevaluated")
        return self.rounds - unevaluated

    @property
    def place(self) -> str:
        """Where the run stands, for people."""
        inside = [f"silo {silo} at {saved.folder.name}" for silo, saved in sorted(self.sections.items())]
        return f"round {self.rounds}" + (f", {', '.join(inside)}" if inside else "")


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
            start = _start_of(self.folder, choice)
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
        earlier = [path for path in borders(self.folder) if _order(path) <= _order(newest)]
        whole = [path for path in earlier if _usable(path, self._passed)]
        best = self.folder / "best"
        kept = {path.name for path in whole[-self.keep :]} | ({best.read_text()} if best.exists() else set())
        for old in borders(self.folder):
            if whole and _order(old) < _order(whole[-1]):
                for unneeded in old.glob("silo-*/") if old.name in kept else [old]:
                    shutil.rmtree(unneeded, ignore_errors=True)

    def _drop_old_sections(self, newest: Path, part: Part) -> None:
        self._sections = [path for path in self._sections if path.parent == newest.parent] + [newest]
        if len(self._sections) < SECTIONS_KEPT:
            return  # what the run has gone on from is needed until then
        for old in set(_steps(newest.parent)) - set(self._sections[-SECTIONS_KEPT:]):
            for path in old.glob(f"{part.name}.*"):
                path.unlink(missing_ok=True)
            if _step(old) < _step(newest):  # a peer may just have made a later one
                with suppress(OSError):  # it is not empty, or a peer was quicker
                    old.rmdir()

    def _is_dropped(self, folder: Path) -> bool:
        """Whether this is a section that nobody needs, a newer border being whole: rank 0 may drop it meanwhile."""
        border = folder.parent.parent
        return border.parent == self.folder and any(
            _order(path) > _order(border) and _usable(path, self._passed) for path in borders(self.folder)
        )


def borders(folder: Path) -> list[Path]:
    """The folders of borders and of sections after them, oldest first, whole or not."""
    return sorted((path for path in folder.glob("round-*") if BORDER.fullmatch(path.name)), key=_order)


def newest_whole(folder: Path) -> Saved | None:
    """The newest whole border in the folder `checkpoints` of a run; its checksums are not read."""
    return next(filter(None, map(find, reversed(borders(folder)))), None)


def choose(folder: Path, silos: Callable[[int], list[str]], passed: list[str]) -> str:
    """The names of the whole states to go on from, relative to the folder, one a line; empty if there are none.

    `silos` are the names of the silos' folders after so many rounds. States whose files occur in `passed` are left out;
    newer ones that are damaged or not whole are added to it.
    """
    for path in reversed(borders(folder)):
        border = _usable(path, passed)
        names = silos(_order(path)[0])
        found = (_newest_section(path / name, passed) for name in names)
        sections = [section.folder for section in found if section]
        if border or len(sections) == len(names):
            chosen = [*([path] if border else []), *sections]
            return "\n".join(str(each.relative_to(folder)) for each in chosen)
        if not any(str(path) in fault for fault in passed):
            passed.append(f"{path} {NOT_WHOLE}")
    return ""


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


def _start_of(folder: Path, choice: str) -> Start:
    paths = [folder / name for name in choice.splitlines()]
    found = {path: find(path) for path in paths}
    border = next((saved for path, saved in found.items() if path.parent == folder), None)
    sections = {int(path.parent.name.split("-")[1]): saved for path, saved in found.items() if path.parent != folder}
    round_folder = border.folder if border else paths[0].parent.parent
    return Start(_order(round_folder)[0], border, {silo: saved for silo, saved in sections.items() if saved})


def _newest_section(silo: Path, passed: list[str]) -> Saved | None:
    return next(filter(None, (_usable(path, passed) for path in reversed(_steps(silo)))), None)


def _steps(silo: Path) -> list[Path]:
    """The folders of a silo's sections, oldest first."""
    return sorted(silo.glob("step-*"), key=_step)


def _step(section: Path) -> int:
    return int(section.name.removeprefix("step-"))


def _usable(path: Path, passed: list[str]) -> Saved | None:
    saved = find(path)
    if saved is None:
        passed += [fault for fault in damaged_notes(path) if fault not in passed]
    return saved if saved and not any(f"{path}/{part}." in fault for fault in passed for part in saved.parts) else None


def _order(path: Path) -> tuple[int, bool]:
    """What borders are sorted by: rounds, and one that was not evaluated before the one that was."""
    name = BORDER.fullmatch(path.name)
    assert name, path
    return int(name[1]), not name[2]


def _bytes(leaf: object) -> int:
    return leaf.nbytes if isinstance(leaf, Tensor) else 0
