"""Tables of the kills and their outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from statistics import median
from typing import TypeVar

from scripts.chaos.kills import Hit
from scripts.chaos.trial import Trial

Target = TypeVar("Target", bound=StrEnum)


def kinds(trials: Sequence[Trial]) -> str:
    """Return a table of the kills by kind."""
    return _by_case("kind", trials, lambda kill: str(kill.kind))


def hits(trials: Sequence[Trial]) -> str:
    """Return tables of the kills by the activity of the worker: of its main thread, and of its writing thread."""
    main = _by_case("what the worker did", trials, lambda kill: kill.mark.doing)
    return f"{main}\n\n{_by_case('what it wrote', trials, _writing)}"


def outcomes(trials: Sequence[Trial]) -> str:
    """Return a table of the runs of each case, with the time from a kill to the next step."""
    rows = []
    for case in _cases(trials):
        mine = [trial for trial in trials if trial.case == case]
        recoveries = [seconds for trial in mine for seconds in trial.recoveries]
        took = f"{median(recoveries):.1f} s, at most {max(recoveries):.1f} s" if recoveries else "-"
        equal = sum(not trial.errors for trial in mine)
        rows.append([case, str(len(mine)), str(equal), str(sum(len(trial.kills) for trial in mine)), took])
    return _table(["case", "runs", "equal", "kills", "from a kill to the next step (median)"], rows)


def missing(trials: Sequence[Trial], planned: Mapping[Target, int]) -> list[str]:
    """Return a sentence for each kind of kill that did not happen as often as planned."""
    counts = Counter(kill.kind for trial in trials for kill in trial.kills)
    return [f"{kind}: {counts[kind]} kills, not {count}" for kind, count in planned.items() if counts[kind] < count]


def _writing(kill: Hit) -> str:
    """Return the level and the stage of the save, without the name of the part."""
    part, _, stage = kill.mark.saving.rpartition(": ")
    if not part or stage == "removal":
        return stage or "nothing"
    return f"{'mid-round' if '/step-' in part else 'round'} checkpoint: {stage}"


def _by_case(title: str, trials: Sequence[Trial], key: Callable[[Hit], str]) -> str:
    """Return a table of the number of kills by key, for each case and for all."""
    cases = _cases(trials)
    counts = {case: Counter(key(kill) for t in trials if t.case == case for kill in t.kills) for case in cases}
    total = sum(counts.values(), Counter())
    rows = [[name, *(str(counts[case][name]) for case in cases), str(total[name])] for name in sorted(total)]
    rows.append(["all", *(str(counts[case].total()) for case in cases), str(total.total())])
    return _table([title, *cases, "all"], rows)


def _cases(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.case for trial in trials))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Align rows below their head; the first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
