"""Measure how well a GPU is used, compared with the same loop written by hand.

    python -m scripts.bench.gpu --all

    gpt          124 million parameters, 32 sequences of 1,024 tokens a step, bfloat16, compiled, fused AdamW
    resnet       ResNet-18 on images of 32 x 32, 512 a step, bfloat16, channels last
    mlp          the 2NN of McMahan et al. 2017 with batch size 10: the time of a step is mostly that of the host
    combination  124 million parameters between two ranks, compared with a bare all-reduce; on one GPU over gloo

Both sides of a model train in one process, alternating between windows of steps; the result is the median of the
ratios. The memory is the peak of a process that trains one side alone. With --tiny everything is small enough for any
machine, including the CPU, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

import torch

from scripts.bench.gpu.cases import Case, cases
from scripts.bench.gpu.sides import Ours, by_hand
from scripts.bench.paired_timing import duel, machine
from trainer.distributed.topology import distributed
from trainer.utils.hardware import peak_memory_bytes

MODELS = ("gpt", "resnet", "mlp")
SIDES = {"ours": Ours, "by-hand": by_hand}
PARAMETERS, PARAMETERS_OF_TINY = 124_000_000, 1_000_000


def compare(name: str, case: Case, windows: int) -> None:
    """Print the rates of both sides and their ratio, and the FLOP/s utilisation of the models that report it."""
    with distributed() as topology:
        ours = Ours(case, topology)
        duel(name, ours, by_hand(case, topology), windows, "examples/s", case.steps * case.batch_size)
        for figure in ("tokens_per_second", "mfu", "measured_mfu"):
            if values := [metrics[figure] for metrics in ours.figures[1:] if figure in metrics]:
                print(f"{'':<8} {figure} {median(values):,.4f}", flush=True)


def peak_alone(case: Case, side: str) -> float:
    """Return the peak memory, in bytes, of this process, which trains two windows on one side."""
    with distributed() as topology:
        train = SIDES[side](case, topology)
        for window in range(2):
            train(window)
        return peak_memory_bytes(topology.device)


def compare_memory(name: str, tiny: bool) -> None:
    """Print the peak memory of processes that train one side each, and their ratio."""
    peaks = [float(_another("scripts.bench.gpu", name, "--alone", side, *["--tiny"] * tiny)) for side in SIDES]
    ours, theirs = (peak / 2**20 for peak in peaks)
    print(f"{name:<8} ours {ours:,.0f} MiB   by hand {theirs:,.0f} MiB   {ours - theirs:+,.0f} MiB", flush=True)


def combination(tiny: bool) -> str:
    """Return the rows of `scripts.bench.comm.combination` for FedAvg between two ranks."""
    numbers, pairs = (PARAMETERS_OF_TINY, 3) if tiny else (PARAMETERS, 15)
    options = ["--algorithms", "fedavg", "--numbers", str(numbers), "--pairs", str(pairs), "--device", "auto"]
    return _another("scripts.bench.comm.combination", *options)


def _another(module: str, *arguments: str) -> str:
    """Run another process, and return its output."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(MODELS)}, combination")
    parser.add_argument("--all", action="store_true", help="all cases")
    parser.add_argument("--windows", type=int, default=11, help="windows of each side, after one that is not counted")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test this program")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--alone", choices=SIDES, help="train this side of one case, and print its peak memory")
    options = parser.parse_args(arguments)
    known, made = [*MODELS, "combination"], cases(options.tiny)
    chosen = known if options.all else options.cases
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; valid: {', '.join(known)}")
    if not chosen:
        parser.error(f"name some of {', '.join(known)}, or say --all")
    if options.alone:
        print(peak_alone(made[chosen[0]], options.alone))
        return
    print(machine(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", sep="; ", flush=True)
    for name in chosen:
        if name == "combination":
            print(combination(options.tiny), flush=True)
            continue
        compare(name, made[name], options.windows)
        if not options.no_memory:
            compare_memory(name, options.tiny)


if __name__ == "__main__":
    main()
