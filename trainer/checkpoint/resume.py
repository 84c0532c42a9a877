"""Choose the checkpoint to resume from: the newest states on disk that are complete and not known to be damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.format import SavedState, damaged_manifests, find_saved

ROUND_FOLDER = re.compile(r"round-(\d{6,})(-unevaluated)?")
BEST = "best"  # the file that names the best round checkpoint
IS_INCOMPLETE = "is not whole"  # ends the message about a save that was interrupted


@dataclass(frozen=True)
class ResumePoint:
    """A round checkpoint, and mid-round checkpoints of some silos in the round after it.

    Attributes:
        rounds: the number of rounds before.
        round_checkpoint: None only if all silos have mid-round checkpoints.
        mid_round: by silo.
        rejected: sentences that say why newer ones cannot be used.
        is_of_other_run: whether it is in the folder of another run, where its best checkpoint stays.
    """

    rounds: int
    round_checkpoint: SavedState | None = None
    mid_round: Mapping[int, SavedState] = field(default_factory=dict)
    rejected: tuple[str, ...] = ()
    is_of_other_run: bool = False

    @property
    def states(self) -> list[SavedState]:
        """The round checkpoint, if there is one, and the mid-round checkpoints."""
        return [*filter(None, [self.round_checkpoint]), *self.mid_round.values()]

    @property
    def logged_rounds(self) -> int:
        """The number of rounds whose metrics the loggers have."""
        unevaluated = self.round_checkpoint is not None and self.round_checkpoint.folder.name.endswith("-unevaluated")
        return self.rounds - unevaluated

    @property
    def description(self) -> str:
        """Where the run resumes, for people."""
        inside = [f"silo {silo} at {saved.folder.name}" for silo, saved in sorted(self.mid_round.items())]
        return f"round {self.rounds}" + (f", {', '.join(inside)}" if inside else "")


def round_folders(folder: Path) -> list[Path]:
    """Return the folders of round checkpoints and of what follows them, oldest first, complete or not."""
    return sorted((path for path in folder.glob("round-*") if ROUND_FOLDER.fullmatch(path.name)), key=round_order)


def newest_complete(folder: Path) -> SavedState | None:
    """Return the newest complete round checkpoint in a run's `checkpoints`. Checksums are not verified."""
    return next(filter(None, map(find_saved, reversed(round_folders(folder)))), None)


def resumable_rounds(folder: Path, count: int = 2) -> int:
    """Return how many rounds, with their evaluation, the oldest of a run's newest complete round checkpoints has.

    Args:
        folder: the run's `checkpoints`.
        count: how many of the newest it may resume from: from the one before if the newest is damaged.
    """
    complete = [path for path in reversed(round_folders(folder)) if find_saved(path)][:count]
    orders = map(round_order, complete)
    return min((rounds if is_evaluated else rounds - 1 for rounds, is_evaluated in orders), default=0)


def best_complete(folder: Path) -> SavedState | None:
    """Return the round checkpoint that a run's `checkpoints` has marked as the best; None if there is none."""
    mark = folder / BEST
    return find_saved(folder / mark.read_text(errors="replace")) if mark.exists() else None


@dataclass(frozen=True)
class Inventory:
    """The checkpoints that a storage holds of one round, and of the round after it.

    Attributes:
        has_round: whether the round checkpoint can be used.
        mid_round: by the folder of each silo that writes there: the names of the usable mid-round checkpoints, newest
            first.
        errors: sentences that say why others cannot be used.
    """

    has_round: bool
    mid_round: dict[str, list[str]]
    errors: list[str]


def local_inventory(path: Path, silos: Sequence[str], rejected: Sequence[str]) -> Inventory:
    """Return what this storage holds of a round checkpoint.

    Args:
        path: the folder of the round checkpoint.
        silos: the folders of the silos that write here.
        rejected: sentences; states whose files occur in them are left out.
    """
    known = list(rejected)
    border = find_usable(path, known) is not None
    sections = {silo: _usable_mid_round(path / silo, known) for silo in silos}
    return Inventory(border, sections, known[len(rejected) :])


def merge_inventories(inventories: Sequence[Inventory]) -> Inventory:
    """Return what all storages hold together, each of them the silos that write there."""
    silos = sorted({silo for holding in inventories for silo in holding.mid_round}, key=silo_number)
    sections = {}
    for silo in silos:
        there = [holding.mid_round[silo] for holding in inventories if silo in holding.mid_round]
        sections[silo] = [step for step in there[0] if all(step in steps for steps in there)]
    errors = dict.fromkeys(fault for holding in inventories for fault in holding.errors)
    return Inventory(all(holding.has_round for holding in inventories), sections, list(errors))


def select_newest(
    folder: Path, names: Iterable[str], take_inventory: Callable[[str], Inventory], rejected: list[str]
) -> ResumePoint | None:
    """Choose the newest states from which all silos can resume; None if there are none.

    Args:
        folder: the run's `checkpoints`.
        names: those of round checkpoints, newest first.
        take_inventory: returns what all storages hold of one.
        rejected: gets sentences that say why newer ones cannot be used.
    """
    for name in names:
        holding, path = take_inventory(name), folder / name
        rejected += holding.errors
        newest = {silo: path / silo / steps[0] for silo, steps in holding.mid_round.items() if steps}
        if holding.has_round or len(newest) == len(holding.mid_round):
            # What other silos have saved need not be on this storage.
            saved = {silo_number(silo): find_saved(section) for silo, section in newest.items()}
            mid_round = {silo: state for silo, state in saved.items() if state}
            return ResumePoint(round_order(path)[0], find_saved(path) if holding.has_round else None, mid_round)
        if not any(str(path) in fault for fault in rejected):
            rejected.append(f"{path} {IS_INCOMPLETE}")
    return None


def silo_number(folder: str) -> int:
    """Return the number of the silo that writes to the folder of this name."""
    return int(folder.split("-")[1])


def _usable_mid_round(silo: Path, rejected: list[str]) -> list[str]:
    """Return the names of the usable ones, newest first. Damage to one older than these is not reported."""
    found: list[str] = []
    for path in reversed(mid_round_folders(silo)):
        if find_usable(path, [*rejected] if found else rejected):
            found.append(path.name)
    return found


def mid_round_folders(silo: Path) -> list[Path]:
    """Return the folders of a silo's mid-round checkpoints, oldest first."""
    return sorted(silo.glob("step-*"), key=step_number)


def step_number(section: Path) -> int:
    """Return the step after which a mid-round checkpoint was saved."""
    return int(section.name.removeprefix("step-"))


def find_usable(path: Path, rejected: list[str]) -> SavedState | None:
    """Return the state in a folder if it is complete and not rejected; add damaged manifests to the rejected."""
    saved = find_saved(path)
    if saved is None:
        rejected += [fault for fault in damaged_manifests(path) if fault not in rejected]
    if saved is None or any(f"{path}/{shard}." in fault for fault in rejected for shard in saved.shards):
        return None
    return saved


def round_order(path: Path) -> tuple[int, bool]:
    """Return the key by which round checkpoints are sorted: rounds, and an unevaluated one before the evaluated one."""
    name = ROUND_FOLDER.fullmatch(path.name)
    assert name, path
    return int(name[1]), not name[2]
