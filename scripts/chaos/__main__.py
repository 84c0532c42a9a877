"""Kill workers of small runs at every kind of moment.

    python -m scripts.chaos --kills 200
    python -m scripts.chaos --combinations 150
    python -m scripts.chaos --shard --kills 50
    python -m scripts.chaos --sites --kills 300

Every case is run once undisturbed, and then as often as the planned kills require. At the end its weights, states,
metrics and rounds must equal those of the undisturbed run, to the last bit. If they do not, or if a kind of kill did
not happen often enough, the exit code is 1 and the folder is kept. A kill counts as the kind that it hit, not as the
kind that was intended.

With --combinations, algorithms, compressions, precisions and other choices are combined at random. Each run is stopped
twice and killed once, at random steps of random ranks.

With --shard, the ranks of a silo hold parts of the model.

With --sites, the run is a coordinator and two or three sites, one of them with two ranks. Whole launches are killed,
single ranks too, and some are preempted or paused beside that. Each is started again until it has finished.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

import torch

from scripts.chaos import cases, kills, trial
from scripts.chaos.combinations import disturb_all
from scripts.chaos.sites import cases as site_cases
from scripts.chaos.sites import strikes
from scripts.chaos.sites import trial as site_trial
from scripts.chaos.tables import hits, kinds, missing, outcomes
from scripts.chaos.trial import Trial

Target = TypeVar("Target", bound=StrEnum)


class Disturbed(Protocol[Target]):
    """A case, whose runs are disturbed."""

    def run_until_done(self, planned: list[Target], random: Random) -> list[Trial]: ...


def main() -> int:
    """Return 0 if every run ended like the undisturbed one and every kind of kill happened."""
    options = _options()
    torch.set_num_threads(1)
    if options.combinations:
        return _end(disturb_all(options.combinations, options.seed, options.folder), options.folder)
    print(f"{options.kills} kills, seed {options.seed}, in {options.folder}", flush=True)
    random = Random(options.seed)
    if options.sites:
        errors = _work_off(strikes.plan(options.kills, options.cases, random), site_trial.Case, options, random)
    else:
        errors = _work_off(kills.plan(options.kills, options.cases, random), trial.Case, options, random)
    return _end(errors, options.folder)


def _work_off(
    planned: dict[str, list[Target]],
    make_case: Callable[[str, int, Path], Disturbed[Target]],
    options: argparse.Namespace,
    random: Random,
) -> list[str]:
    """Disturb runs of each case as planned, and print tables; return what was not as it should be."""
    wanted = Counter(kind for each in planned.values() for kind in each)
    trials: list[Trial] = []
    for name, kinds_of_case in planned.items():
        trials += make_case(name, options.rounds, options.folder).run_until_done(kinds_of_case, random)
    for table in (kinds(trials), hits(trials), outcomes(trials)):
        print(f"\n{table}", flush=True)
    return [fault for each in trials for fault in each.errors] + missing(trials, wanted)


def _end(errors: list[str], folder: Path) -> int:
    """Print the errors, or remove the folder; return the exit code."""
    if not errors:
        shutil.rmtree(folder)
    print("", *errors or ["every run ended like the undisturbed one"], sep="\n", flush=True)
    return 1 if errors else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", action="store_true", help="a coordinator and sites, instead of one world")
    parser.add_argument("--shard", action="store_true", help="silos whose ranks hold parts of the model")
    parser.add_argument("--kills", type=int, default=20, help="the minimum number of kills, over all cases")
    parser.add_argument("--combinations", type=int, default=0, help="the number of random combinations, without kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the combinations, victims, moments and order of kinds")
    parser.add_argument("--cases", nargs="+", help="the cases to run; all of them by default")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of a run, a second or two each")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/chaos"), help="a new folder, removed after success"
    )
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} is there already: remove it, or choose another")
    names = site_cases.CASES if options.sites else cases.SHARDED_CASES if options.shard else cases.CASES
    options.cases = options.cases or list(names)
    if unknown := set(options.cases) - set(names):
        parser.error(f"--cases {' '.join(sorted(unknown))}: valid are {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
