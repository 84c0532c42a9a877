"""A case of sites: its undisturbed run, and its runs with strikes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

from scripts.chaos.compare import differences
from scripts.chaos.sites.cases import CASES, COMMON, trees, write_files
from scripts.chaos.sites.federation import Federation, under_way
from scripts.chaos.sites.striker import Striker
from scripts.chaos.sites.strikes import Kind
from scripts.chaos.trial import Trial

STRIKES_IN_A_RUN = 16
SECONDS_TO_END = 120  # after the last strike
IDLE_RUNS = 3  # the limit of consecutive runs without a strike


class Case:
    """A federation to disturb, and its runs in a folder: `<case>-alone`, `<case>-1`, `<case>-2`, ..."""

    def __init__(self, name: str, rounds: int, folder: Path):
        self.name, self.folder, self.runs = name, folder, 0
        self.sites = CASES[name].sites
        self.alone = folder / f"{name}-alone"
        self.overrides = [*COMMON, *CASES[name].overrides, f"rounds={rounds}"]
        write_files(folder / f"{name}-files", self.sites)

    def run_until_done(self, planned: list[Kind], random: Random) -> list[Trial]:
        """Run it undisturbed, then with strikes until all planned ones are done or no strike happens any more."""
        self.run_alone()
        trials: list[Trial] = []
        while planned and (len(trials) < IDLE_RUNS or any(trial.kills for trial in trials[-IDLE_RUNS:])):
            trials.append(self.disturb(planned, random))
        return trials

    def run_alone(self) -> None:
        """Run it undisturbed."""
        with under_way(self._trees(self.alone), self.alone) as federation:
            federation.wait(lambda: False, SECONDS_TO_END)
            assert not (errors := _faults(federation)), errors
        print(f"{self.name}, alone: {time.monotonic() - federation.began:.0f} s", flush=True)

    def disturb(self, planned: list[Kind], random: Random) -> Trial:
        """Run it with as many of the planned strikes as possible, remove them from the plan, and print each."""
        self.runs += 1
        folder, strikes = self.folder / f"{self.name}-{self.runs}", []
        with under_way(self._trees(folder), folder) as federation:
            for strike in Striker(federation, random).work_off(planned, STRIKES_IN_A_RUN):
                print(f"{self.name:<9} {strike}", flush=True)
                strikes.append(strike)
            federation.wait(lambda: False, SECONDS_TO_END)
            errors = [f"{folder.name}: {fault}" for fault in _faults(federation)]
        errors = errors or [
            f"{folder.name}/{name}: {difference}"
            for name in federation.members
            for difference in differences(self.alone / name, folder / name)
        ]
        seconds = time.monotonic() - federation.began
        trial = Trial(self.name, self.runs, tuple(strikes), (), seconds, tuple(errors))
        print("\n".join([str(trial), *errors]), flush=True)
        if not errors:
            shutil.rmtree(folder)
        return trial

    def _trees(self, folder: Path) -> dict[str, dict[str, Any]]:
        folder.mkdir()
        return trees(self.overrides, self.sites, self.folder / f"{self.name}-files", folder, "127.0.0.1")


def _faults(federation: Federation) -> list[str]:
    """Return why members have not finished, and starts of ranks after a failure that nobody caused."""
    found = list(federation.failures)
    for member in federation.members.values():
        if not member.has_finished and not found:
            found.append(f"{member.name} hangs, {member.mark().doing}: {member.run.log}")
        restarts = [line for line in member.run.log.read_text().splitlines() if "; restart " in line]
        found += [f"{line}: {member.run.log}" for line in restarts if "was killed by SIGKILL" not in line]
    return found
