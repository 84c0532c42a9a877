"""What a run goes on from: the newest states on disk that are whole, and not known to be damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoint.format import Saved, damaged_notes, find

BORDER = re.compile(r"round-(\d{6,})(-unevaluated)?")
NOT_WHOLE = "is not whole"  # what is said of a save that did not come to its end


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
        """The rounds whose figures have been given to the loggers."""
        unevaluated = self.border is not None and self.border.folder.name.endswith("-unevaluated")
        return self.rounds - unevaluated

    @property
    def place(self) -> str:
        """Where the run stands, for people."""
        inside = [f"silo {silo} at {saved.folder.name}" for silo, saved in sorted(self.sections.items())]
        return f"round {self.rounds}" + (f", {', '.join(inside)}" if inside else "")


def borders(folder: Path) -> list[Path]:
    """The folders of borders and of sections after them, oldest first, whole or not."""
    return sorted((path for path in folder.glob("round-*") if BORDER.fullmatch(path.name)), key=order)


def newest_whole(folder: Path) -> Saved | None:
    """The newest whole border in the folder `checkpoints` of a run; its checksums are not read."""
    return next(filter(None, map(find, reversed(borders(folder)))), None)


@dataclass(frozen=True)
class Holding:
    """What a disk holds of a border: whether it can be used, which sections of the silos after it, and why not others.

    sections  by the folder of each silo that is at home there: the names of those that can be used, newest first
    """

    border: bool
    sections: dict[str, list[str]]
    faults: list[str]


def held(path: Path, silos: Sequence[str], passed: Sequence[str]) -> Holding:
    """What this disk holds of the border in this folder. States whose files occur in `passed` are left out."""
    known = list(passed)
    border = usable(path, known) is not None
    sections = {silo: _usable_sections(path / silo, known) for silo in silos}
    return Holding(border, sections, known[len(passed) :])


def together(holdings: Sequence[Holding]) -> Holding:
    """What all disks hold, each that of the silos at home there."""
    silos = sorted(
        {silo for holding in holdings for silo in holding.sections}, key=lambda silo: int(silo.split("-")[1])
    )
    sections = {}
    for silo in silos:
        there = [holding.sections[silo] for holding in holdings if silo in holding.sections]
        sections[silo] = [step for step in there[0] if all(step in steps for steps in there)]
    faults = dict.fromkeys(fault for holding in holdings for fault in holding.faults)
    return Holding(all(holding.border for holding in holdings), sections, list(faults))


def choose(folder: Path, names: Iterable[str], look: Callable[[str], Holding], passed: list[str]) -> str:
    """The names of the whole states to go on from, relative to the folder, one a line; empty if there are none.

    `names` are those of borders, newest first; `look` says what is held of one. Why newer ones cannot be used is added
    to `passed`.
    """
    for name in names:
        holding = look(name)
        passed += holding.faults
        sections = [f"{name}/{silo}/{steps[0]}" for silo, steps in holding.sections.items() if steps]
        if holding.border or len(sections) == len(holding.sections):
            return "\n".join([*([name] if holding.border else []), *sections])
        if not any(str(folder / name) in fault for fault in passed):
            passed.append(f"{folder / name} {NOT_WHOLE}")
    return ""


def start_of(folder: Path, choice: str) -> Start:
    """The Start of these names, as `choose` gives them."""
    paths = [folder / name for name in choice.splitlines()]
    found = {path: find(path) for path in paths}
    border = next((saved for path, saved in found.items() if path.parent == folder), None)
    sections = {int(path.parent.name.split("-")[1]): saved for path, saved in found.items() if path.parent != folder}
    round_folder = border.folder if border else paths[0].parent.parent
    return Start(order(round_folder)[0], border, {silo: saved for silo, saved in sections.items() if saved})


def _usable_sections(silo: Path, passed: list[str]) -> list[str]:
    """The names of those that can be used, newest first. What is older than one of them is no loss, if it cannot."""
    found: list[str] = []
    for path in reversed(steps(silo)):
        if usable(path, [*passed] if found else passed):
            found.append(path.name)
    return found


def steps(silo: Path) -> list[Path]:
    """The folders of a silo's sections, oldest first."""
    return sorted(silo.glob("step-*"), key=step_of)


def step_of(section: Path) -> int:
    """The step after which a section was saved."""
    return int(section.name.removeprefix("step-"))


def usable(path: Path, passed: list[str]) -> Saved | None:
    """What is in this folder, if it is whole and none of its parts is among the faults. Damaged notes are added."""
    saved = find(path)
    if saved is None:
        passed += [fault for fault in damaged_notes(path) if fault not in passed]
    return saved if saved and not any(f"{path}/{part}." in fault for fault in passed for part in saved.parts) else None


def order(path: Path) -> tuple[int, bool]:
    """What borders are sorted by: rounds, and one that was not evaluated before the one that was."""
    name = BORDER.fullmatch(path.name)
    assert name, path
    return int(name[1]), not name[2]
