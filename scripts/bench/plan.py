"""Compare the predictions of `python -m trainer plan` with real runs.

    python -m scripts.bench.plan

Each case is planned and run several times, alternating. The prediction is the median of the planned seconds of a round;
the measurement is the median over all rounds of all runs, except the first round of each. Two ranks of one thread run
on this machine. With --hosts each has its own network, joined by a link of 100 Mbit/s, which needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from scripts.bench.paired_timing import machine
from scripts.network_namespaces import Host, new_hosts
from trainer.commands.plan.console import WHOLE_ROUND
from trainer.data import DataSplits, SequenceWindows, TensorSource

HERE = (
    "launch.nproc_per_node=2",
    "launch.threads_per_worker=1",
    "launch.device=cpu",
    "eval.every_rounds=1000",
    "checkpoint.every_rounds=1000",
)
SMALL = ("data=custom", "rounds=16", "algorithm=fedavg", "silos=2")
MNIST = ("data._target_=scripts.bench.plan.images", "+data.examples=6000", "model=mlp", "batch_size=10")
GPT = ("data._target_=scripts.bench.plan.tokens", "+data.windows=400", "model=gpt", "task=language_modelling")
DILOCO = ("algorithm=diloco", "batch_size=8", "round.steps=10")

CASES: dict[str, tuple[str, ...]] = {
    "digits CNN, fedavg": (*SMALL, "data=digits"),
    "digits CNN, sync": ("rounds=16", "data=digits"),
    "2NN, fedavg": (*SMALL, *MNIST),
    "gpt, diloco": (*SMALL, *GPT, *DILOCO),
}
MEETING = 29733
RATE, LINKS = "100mbit", ("plan.bandwidth=100Mbit", "plan.bandwidth_inside=100Mbit")
FOUND = re.compile(rf"^{WHOLE_ROUND} +([\d.,]+)", re.MULTILINE)


def images(examples: int) -> DataSplits:
    """Return noise in the shape of MNIST."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, 1, 28, 28, generator=generator)
    source = TensorSource(inputs, torch.randint(0, 10, (examples,), generator=generator))
    return DataSplits(source, source, 10)


def tokens(windows: int) -> DataSplits:
    """Return noise in the shape of bytes of text."""
    drawn = torch.randint(0, 256, (windows * 129,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    source = SequenceWindows(drawn.view(windows, 129), 128)
    return DataSplits(source, source, 256)


def outputs(commands: Sequence[Sequence[str]]) -> str:
    """Run commands in parallel and return their outputs; raise RuntimeError with the output if one fails."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            for each in commands
        ]
        printed = "\n".join(process.communicate()[0] for process in started)
    if any(process.returncode for process in started):
        raise RuntimeError(printed)
    return printed


def commands(hosts: Sequence[Host], *arguments: str) -> list[list[str]]:
    """Return the command of the trainer with these arguments, for each host, or for this machine if there are none."""
    trainer = [sys.executable, "-m", "trainer", *arguments]
    meeting = ("launch.nproc_per_node=1", f"launch.nodes={len(hosts)}")
    where = f"launch.rdzv_endpoint={hosts[0].address}:{MEETING}" if hosts else ""
    return [[*host.inside, *trainer, *meeting, where] for host in hosts] or [trainer]


def predicted(hosts: Sequence[Host], case: Sequence[str], *wishes: str) -> float:
    """Return the planned seconds of a round: the largest, if links are given and each host has a plan."""
    found = FOUND.findall(outputs(commands(hosts, "plan", *HERE, *case, *wishes)))
    return max(float(seconds.replace(",", "")) for seconds in found)


def measured(hosts: Sequence[Host], case: Sequence[str]) -> list[float]:
    """Return the seconds of each round of a run except the first."""
    with tempfile.TemporaryDirectory() as folder:
        outputs(commands(hosts, *HERE, *case, f"run_dir={folder}/run"))
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds/round"] for line in lines][1:]


def compare(name: str, case: Sequence[str], hosts: Sequence[Host], pairs: int, wishes: Sequence[str]) -> None:
    """Print a row of the table."""
    plans, rounds = [], []
    for _ in range(pairs):
        plans.append(predicted(hosts, case, *wishes))
        rounds += measured(hosts, case)
    rounds.sort()
    middle = f"{rounds[len(rounds) // 4]:.3f} to {rounds[-1 - len(rounds) // 4]:.3f}"
    each = ", ".join(f"{plan:.3f}" for plan in plans)
    ratio = median(plans) / median(rounds)
    print(f"| {name} | {median(plans):.3f} s ({each}) | {median(rounds):.3f} s ({middle}) | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--hosts", action="store_true")
    choices = parser.parse_args()
    print(f"{machine()}; load before {os.getloadavg()[0]:.1f}")
    print("| case | predicted (each plan) | measured (middle half) | predicted / measured |")
    with ExitStack() as stack:
        hosts = stack.enter_context(new_hosts(2)) if choices.hosts else []
        for host in hosts:
            host.limit(RATE)
        for name in choices.cases:
            compare(name, CASES[name], hosts, choices.pairs, ())
            if hosts:
                compare(f"{name}, links given", CASES[name], hosts, choices.pairs, LINKS)
    print(f"load after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
