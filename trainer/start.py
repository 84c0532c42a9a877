"""What a run goes on from: the newest states on disk that are whole, and not known to be damaged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.parts import Saved, damaged_notes, find

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
        """The rounds whose figures have been given to the sinks."""
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


def choose(folder: Path, silos: Callable[[int], list[str]], passed: list[str]) -> str:
    """The names of the whole states to go on from, relative to the folder, one a line; empty if there are none.

    `silos` are the names of the silos' folders after so many rounds. States whose files occur in `passed` are left out;
    newer ones that are damaged or not whole are added to it.
    """
    for path in reversed(borders(folder)):
        border = usable(path, passed)
        names = silos(order(path)[0])
        found = (_newest_section(path / name, passed) for name in names)
        sections = [section.folder for section in found if section]
        if border or len(sections) == len(names):
            chosen = [*([path] if border else []), *sections]
            return "\n".join(str(each.relative_to(folder)) for each in chosen)
        if not any(str(path) in fault for fault in passed):
            passed.append(f"{path} {NOT_WHOLE}")
    return ""


def start_of(folder: Path, choice: str) -> Start:
    """The Start of these names, as `choose` gives them."""
    paths = [folder / name for name in choice.splitlines()]
    found = {path: find(path) for path in paths}
    border = next((saved for path, saved in found.items() if path.parent == folder), None)
    sections = {int(path.parent.name.split("-")[1]): saved for path, saved in found.items() if path.parent != folder}
    round_folder = border.folder if border else paths[0].parent.parent
    return Start(order(round_folder)[0], border, {silo: saved for silo, saved in sections.items() if saved})


def _newest_section(silo: Path, passed: list[str]) -> Saved | None:
    return next(filter(None, (usable(path, passed) for path in reversed(steps(silo)))), None)


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
