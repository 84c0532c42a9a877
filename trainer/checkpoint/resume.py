"""What a run goes on from: the newest states on disk that are whole, and not known to be damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.format import SavedState, damaged_manifests, find_saved

ROUND_FOLDER = re.compile(r"round-(\d{6,})(-unevaluated)?")
IS_INCOMPLETE = "is not whole"  # what is said of a save that did not come to its end


@dataclass(frozen=True)
class ResumePoint:
    """What a run goes on from: a border, and inside the round after it, the sections of some silos.

    round_checkpoint    None only if all silos have sections
    mid_round  by silo
    rejected    why newer ones cannot be used, as sentences
    """

    rounds: int
    round_checkpoint: SavedState | None = None
    mid_round: Mapping[int, SavedState] = field(default_factory=dict)
    rejected: tuple[str, ...] = ()

    @property
    def states(self) -> list[SavedState]:
        return [*filter(None, [self.round_checkpoint]), *self.mid_round.values()]

    @property
    def logged_rounds(self) -> int:
        """The rounds whose figures have been given to the loggers."""
        unevaluated = self.round_checkpoint is not None and self.round_checkpoint.folder.name.endswith("-unevaluated")
        return self.rounds - unevaluated

    @property
    def description(self) -> str:
        """Where the run stands, for people."""
        inside = [f"silo {silo} at {saved.folder.name}" for silo, saved in sorted(self.mid_round.items())]
        return f"round {self.rounds}" + (f", {', '.join(inside)}" if inside else "")


def round_folders(folder: Path) -> list[Path]:
    """The folders of borders and of sections after them, oldest first, whole or not."""
    return sorted((path for path in folder.glob("round-*") if ROUND_FOLDER.fullmatch(path.name)), key=round_order)


def newest_complete(folder: Path) -> SavedState | None:
    """The newest whole border in the folder `checkpoints` of a run; its checksums are not read."""
    return next(filter(None, map(find_saved, reversed(round_folders(folder)))), None)


@dataclass(frozen=True)
class Inventory:
    """What a disk holds of a border: whether it can be used, which sections of the silos after it, and why not others.

    mid_round  by the folder of each silo that is at home there: the names of those that can be used, newest first
    """

    has_round: bool
    mid_round: dict[str, list[str]]
    errors: list[str]


def local_inventory(path: Path, silos: Sequence[str], rejected: Sequence[str]) -> Inventory:
    """What this disk holds of the border in this folder. States whose files occur in `rejected` are left out."""
    known = list(rejected)
    border = find_usable(path, known) is not None
    sections = {silo: _usable_mid_round(path / silo, known) for silo in silos}
    return Inventory(border, sections, known[len(rejected) :])


def merge_inventories(inventories: Sequence[Inventory]) -> Inventory:
    """What all disks hold, each that of the silos at home there."""
    silos = sorted(
        {silo for holding in inventories for silo in holding.mid_round}, key=lambda silo: int(silo.split("-")[1])
    )
    sections = {}
    for silo in silos:
        there = [holding.mid_round[silo] for holding in inventories if silo in holding.mid_round]
        sections[silo] = [step for step in there[0] if all(step in steps for steps in there)]
    errors = dict.fromkeys(fault for holding in inventories for fault in holding.errors)
    return Inventory(all(holding.has_round for holding in inventories), sections, list(errors))


def select_newest(
    folder: Path, names: Iterable[str], take_inventory: Callable[[str], Inventory], rejected: list[str]
) -> str:
    """The names of the whole states to go on from, relative to the folder, one a line; empty if there are none.

    `names` are those of borders, newest first; `take_inventory` says what is held of one. Why newer ones cannot be used is added
    to `rejected`.
    """
    for name in names:
        holding = take_inventory(name)
        rejected += holding.errors
        sections = [f"{name}/{silo}/{steps[0]}" for silo, steps in holding.mid_round.items() if steps]
        if holding.has_round or len(sections) == len(holding.mid_round):
            return "\n".join([*([name] if holding.has_round else []), *sections])
        if not any(str(folder / name) in fault for fault in rejected):
            rejected.append(f"{folder / name} {IS_INCOMPLETE}")
    return ""


def load_resume_point(folder: Path, choice: str) -> ResumePoint:
    """The ResumePoint of these names, as `choose` gives them."""
    paths = [folder / name for name in choice.splitlines()]
    found = {path: find_saved(path) for path in paths}
    border = next((saved for path, saved in found.items() if path.parent == folder), None)
    sections = {int(path.parent.name.split("-")[1]): saved for path, saved in found.items() if path.parent != folder}
    round_folder = border.folder if border else paths[0].parent.parent
    return ResumePoint(round_order(round_folder)[0], border, {silo: saved for silo, saved in sections.items() if saved})


def _usable_mid_round(silo: Path, rejected: list[str]) -> list[str]:
    """The names of those that can be used, newest first. What is older than one of them is no loss, if it cannot."""
    found: list[str] = []
    for path in reversed(mid_round_folders(silo)):
        if find_usable(path, [*rejected] if found else rejected):
            found.append(path.name)
    return found


def mid_round_folders(silo: Path) -> list[Path]:
    """The folders of a silo's sections, oldest first."""
    return sorted(silo.glob("step-*"), key=step_number)


def step_number(section: Path) -> int:
    """The step after which a section was saved."""
    return int(section.name.removeprefix("step-"))


def find_usable(path: Path, rejected: list[str]) -> SavedState | None:
    """What is in this folder, if it is whole and none of its parts is among the faults. Damaged notes are added."""
    saved = find_saved(path)
    if saved is None:
        rejected += [fault for fault in damaged_manifests(path) if fault not in rejected]
    return (
        saved if saved and not any(f"{path}/{part}." in fault for fault in rejected for part in saved.shards) else None
    )


def round_order(path: Path) -> tuple[int, bool]:
    """What borders are sorted by: rounds, and one that was not evaluated before the one that was."""
    name = ROUND_FOLDER.fullmatch(path.name)
    assert name, path
    return int(name[1]), not name[2]
