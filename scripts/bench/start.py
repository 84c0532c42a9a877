"""Measure the cost of a worker besides its steps.

    python -m scripts.bench.start

Two workers of one thread each are started. For rank 0, the script measures the seconds from its start to the end of its
first step, and its peak memory in a run of 3 epochs. Ours is `-m trainer` on the digits with all logging, evaluation
and checkpoints, under bare torchrun. The other side is a script with the same model, the same arrays and a hand-written
loop. The sides alternate.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

EPOCHS = 3
BATCH_SIZE = 32


def seconds_since_start() -> float:
    """Return the age of this process in seconds."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def ours(folder: str) -> float:
    """Run a worker of the trainer, and return its age at the end of its first step."""
    from trainer.commands import main as cli
    from trainer.loop.local_trainer import ClientResult

    ages: list[float] = []
    add = ClientResult.add

    def noting(result: ClientResult, *arguments: Any) -> None:
        ages.append(seconds_since_start())
        add(result, *arguments)

    with patch.object(ClientResult, "add", noting):
        cli.main([f"rounds={EPOCHS}", f"batch_size={BATCH_SIZE}", f"run_dir={folder}", "data.validation=0"])
    return ages[0]


def by_hand(folder: str) -> float:
    """Train the same by hand, and return the age of the process at the end of its first step."""
    import torch
    import torch.distributed as dist

    from scripts.bench import ddp_baseline
    from trainer.data import digits
    from trainer.models import DigitsCNN

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train = digits().train
    inputs, targets = train.fetch(torch.arange(len(train)))
    model = DigitsCNN()
    wrapped, optimizer = ddp_baseline.wrap(model), torch.optim.SGD(model.parameters(), lr=0.1)
    age = 0.0
    for _ in range(EPOCHS):
        batches = ddp_baseline.shares(torch.randperm(len(targets)), BATCH_SIZE)
        for batch in batches:
            ddp_baseline.steps(wrapped, optimizer, torch.nn.functional.cross_entropy, inputs, targets, [batch])
            age = age or seconds_since_start()
    dist.destroy_process_group()
    return age


SIDES = {"ours": ours, "by hand": by_hand}


def run(side: str) -> tuple[float, float]:
    """Return rank 0's seconds to the end of the first step, and its peak memory in MB, in a world of two."""
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, "-m", "scripts.bench.start", "--side", side, "--folder", f"{folder}/run"]
        output = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    seconds, megabytes = output.strip().splitlines()[-1].split()
    return float(seconds), float(megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    choices = parser.parse_args()
    if choices.side:
        age = SIDES[choices.side](choices.folder)
        if os.environ["RANK"] == "0":
            print(age, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
        return
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(choices.pairs):
        for side in SIDES:
            figures[side].append(run(side))
    for side, pairs in figures.items():
        seconds, megabytes = (sorted(values) for values in zip(*pairs, strict=True))
        print(
            f"{side:<8} first step after {median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), "
            f"peak memory {median(megabytes):.0f} MB ({megabytes[0]:.0f} to {megabytes[-1]:.0f})"
        )


if __name__ == "__main__":
    main()
