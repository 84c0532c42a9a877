"""Kill workers of small runs at every kind of moment.

    python -m scripts.chaos --kills 200
    python -m scripts.chaos --combinations 150

Every case is run once undisturbed, and then as often as the planned kills require. At the end its weights, states,
metrics and rounds must equal those of the undisturbed run, to the last bit. If they do not, or if a kind of kill did
not happen often enough, the exit code is 1 and the folder is kept. A kill counts as the kind that it hit, not as the
kind that was intended.

With --combinations, algorithms, compressions, precisions and other choices are combined at random. Each run is stopped
twice and killed once, at random steps of random ranks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from random import Random

import torch

from scripts.chaos.cases import CASES, ROUNDS
from scripts.chaos.combinations import disturb_all
from scripts.chaos.kills import plan
from scripts.chaos.tables import hits, kinds, missing, outcomes
from scripts.chaos.trial import Case, Trial


def main() -> int:
    """Return 0 if every run ended like the undisturbed one and every kind of kill happened."""
    options = _options()
    torch.set_num_threads(1)
    if options.combinations:
        return _end(disturb_all(options.combinations, options.seed, options.folder), options.folder)
    random, trials = Random(options.seed), list[Trial]()
    print(f"{options.kills} kills, seed {options.seed}, in {options.folder}", flush=True)
    for name, planned in plan(options.kills, options.cases, random).items():
        trials += Case(name, CASES[name], options.rounds, options.folder).run_until_done(planned, random)
    for table in (kinds(trials), hits(trials), outcomes(trials)):
        print(f"\n{table}", flush=True)
    return _end([fault for trial in trials for fault in trial.errors] + missing(trials, options.kills), options.folder)


def _end(errors: list[str], folder: Path) -> int:
    """Print the errors, or remove the folder; return the exit code."""
    if not errors:
        shutil.rmtree(folder)
    print("", *errors or ["every run ended like the undisturbed one"], sep="\n", flush=True)
    return 1 if errors else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="the minimum number of kills, over all cases")
    parser.add_argument("--combinations", type=int, default=0, help="the number of random combinations, without kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the combinations, victims, moments and order of kinds")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the cases to run")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of a run, a second or two each")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/chaos"), help="a new folder, removed after success"
    )
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"--folder {options.folder} is there already: remove it, or choose another")
    return options


if __name__ == "__main__":
    sys.exit(main())
