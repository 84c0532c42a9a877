"""Measure how much faster workers read a Dataset whose items take their time.

    python -m scripts.bench.loading --workers 0 4

Two ranks train on a Dataset whose items wait for 20 ms, as for a disk or a network, without using the processor. A run
for each number of workers; of its rounds the median rate counts, without the first one, in which workers start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data import DataSplits, TensorSource

FEATURES, CLASSES, TESTS = 20, 3, 64


class Waiting(Dataset[tuple[Tensor, int]]):
    """Items that can be read after some seconds."""

    def __init__(self, examples: int, seconds: float):
        self.examples, self.seconds = examples, seconds

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        return torch.randn(FEATURES), index % CLASSES


def load(examples: int, seconds: float) -> DataSplits:
    """Return a Dataset that waits, and test examples that do not."""
    test = TensorSource(torch.zeros(TESTS, FEATURES), torch.arange(TESTS) % CLASSES)
    return DataSplits(Waiting(examples, seconds), test, CLASSES)


def examples_per_second(workers: int, options: argparse.Namespace) -> float:
    """Train with this number of workers a rank, and return the rate."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "data=custom",
            "data._target_=scripts.bench.loading.load",
            f"+data.examples={options.examples}",
            f"+data.seconds={options.seconds}",
            f"data.workers={workers}",
            "data.validation=0",
            "model=mlp",
            f"model.inputs={FEATURES}",
            f"model.classes={CLASSES}",
            f"batch_size={options.batch_size}",
            f"rounds={options.rounds}",
            f"launch.nproc_per_node={options.ranks}",
            "launch.device=cpu",
            f"run_dir={folder}/run",
        ]
        subprocess.run([sys.executable, "-m", "trainer", *overrides], check=True, stdout=subprocess.DEVNULL)
        rounds = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return median(metrics["examples_per_second"] for metrics in rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates = {workers: examples_per_second(workers, options) for workers in options.workers}
    first = rates[options.workers[0]]
    for workers, rate in rates.items():
        print(f"{workers} workers a rank: {rate:.1f} examples a second, {rate / first:.2f} times the first")


if __name__ == "__main__":
    main()
