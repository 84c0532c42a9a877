"""Kills workers of small runs at every kind of moment: python -m scripts.chaos --kills 200

Every case is run once untouched, and then as often as it takes with kills. At the end its weights, states, figures and
rounds must be those of the untouched run, to the last bit; if not, or if a kind of kill did not come about often
enough, the exit code is 1, and the folder stays. A kill counts as what it hit, not as what it was meant to hit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from random import Random

import torch

from scripts.chaos.cases import CASES, ROUNDS
from scripts.chaos.kills import plan
from scripts.chaos.tables import hits, kinds, missing, outcomes
from scripts.chaos.trial import Case, Trial


def main() -> int:
    """0 when every run ended as if it had not been touched, and every kind of kill came about."""
    options = _options()
    torch.set_num_threads(1)
    random, trials = Random(options.seed), list[Trial]()
    print(f"{options.kills} kills, seed {options.seed}, in {options.folder}", flush=True)
    for name, planned in plan(options.kills, options.cases, random).items():
        trials += Case(name, CASES[name], options.rounds, options.folder).run_until_done(planned, random)
    for table in (kinds(trials), hits(trials), outcomes(trials)):
        print(f"\n{table}", flush=True)
    errors = [fault for trial in trials for fault in trial.errors] + missing(trials, options.kills)
    if not errors:
        shutil.rmtree(options.folder)
    print("", *errors or ["every run ended as the one that was left alone"], sep="\n", flush=True)
    return 1 if errors else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many at least, over all cases")
    parser.add_argument("--seed", type=int, default=0, help="what victims, moments and the order of kinds come from")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of a run, a second or two each")
    parser.add_argument("--folder", type=Path, default=Path("outputs/chaos"), help="new; removed if all went well")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} is there already: remove it, or choose another")
    return options


if __name__ == "__main__":
    sys.exit(main())
