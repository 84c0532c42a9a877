"""Show that a change of the code changed no bit.

    python -m scripts.same_bits NEW.json --compare OLD.json

Some 40 small configurations are trained through the command line, two rounds each, on one to four gloo ranks of one
thread. A table has, for each of them, the SHA-256 of the model's file, and the numbers of result.json that do not
depend on the clock or on memory. The same code gives the same table on the same machine with the same packages.

    git switch --detach COMMIT && python -m scripts.same_bits old.json    # before the change
    git switch - && python -m scripts.same_bits new.json --compare old.json

Files and metrics that only the new table has are no difference. Configurations keep their names if configuration keys
are renamed. If a metric has another name in the new table, give it: --renamed train/gradient_norm=train/grad_norm. To
compare two existing tables again, add --reuse.

The exit code is 1 if a run failed or a configuration differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from scripts.bench.paired_timing import machine
from scripts.chaos.compare import is_of_the_machine

ROOT = Path(__file__).parents[1]
PREEMPTED = 75  # the exit code of a preempted run
SECONDS_BETWEEN_LOOKS = 0.01
LAST_LINES = 20  # of the output of a run that failed


@dataclass(frozen=True)
class Configuration:
    """A run to compare.

    Attributes:
        overrides: the overrides on the command line; TEXT stands for the path of a generated text.
        ranks: the number of workers.
        is_interrupted: whether it gets SIGTERM in the middle of its second round, saves, exits and is started again.
    """

    overrides: tuple[str, ...]
    ranks: int = 2
    is_interrupted: bool = False


def _on_clients(*overrides: str) -> Configuration:
    """Five clients of unequal sizes and labels on two silos."""
    return Configuration(("silos=2", "clients=5", "partition=dirichlet", *overrides))


def _on_replicas(*overrides: str) -> Configuration:
    """Synchronous training by the two replicas of one silo."""
    return Configuration(("algorithm=sync", *overrides))


def _interrupted(*overrides: str) -> Configuration:
    """Rounds that are long enough to be interrupted, of a model with dropout and batch statistics."""
    return Configuration((*NOISY, "checkpoint.every_seconds=0.1", *overrides), is_interrupted=True)


NOISY = ("model=custom", "model._target_=scripts.chaos.cases.Noisy")  # dropout, BatchNorm; 574,570 parameters
ADAM = ("algorithm=fedavg", "server=adam")
GPT = ("data=text", "data.path=TEXT", "data.length=32", "batch_size=16")
SMALL_GPT = (*GPT, "model.layers=2", "model.heads=2", "model.width=32")
STREAMING = ("algorithm=streaming", "algorithm.fragments=2", "algorithm.overlap_steps=3")
BOUNDED = (
    "algorithm=fedavg",
    "algorithm.max_update_norm=0.2",
    "algorithm.weighting=capped",
    "algorithm.max_weight=100",
)
PERSONAL_HEAD = ("algorithm=fedavg", "algorithm.shared_params=conv", "eval.personal_steps=2")

CONFIGURATIONS = {
    # Every algorithm
    "sync": _on_replicas("optimizer=momentum"),
    "fedavg": _on_clients("algorithm=fedavg"),
    "averaging": _on_clients("algorithm=averaging"),
    "fedprox": _on_clients("algorithm=fedprox"),
    "fedsgd": _on_clients("algorithm=fedsgd"),
    "fednova": _on_clients("algorithm=fednova", "optimizer=momentum"),
    "scaffold": _on_clients("algorithm=scaffold"),
    "feddyn": _on_clients("algorithm=feddyn"),
    "fedavgm": _on_clients("algorithm=fedavgm"),
    "fedadagrad": _on_clients("algorithm=fedadagrad"),
    "fedadam": _on_clients("algorithm=fedadam"),
    "fedyogi": _on_clients("algorithm=fedyogi"),
    "fedbn": _on_clients("algorithm=fedbn", "model.norm=batch"),
    "local": _on_clients("algorithm=local"),
    "post-local": _on_clients("algorithm=post_local", "round.sync_rounds=1", "round.steps=8"),
    "diloco": _on_clients("algorithm=diloco"),
    "streaming": _on_clients(*STREAMING, "round.steps=8"),
    "delayed": _on_clients("algorithm=delayed", "algorithm.overlap_steps=3"),
    "krum": _on_clients("algorithm=krum"),
    "median": _on_clients("algorithm=median"),
    "trimmed-mean": _on_clients("algorithm=trimmed_mean", "algorithm.rule.trim=0.2"),
    # Between silos
    "fedavg-bf16": _on_clients("algorithm=fedavg", "update_compression=bf16"),
    "fedavg-fp16": _on_clients("algorithm=fedavg", "update_compression=fp16"),
    "fedavg-int8": _on_clients("algorithm=fedavg", "update_compression=int8"),
    "fedavg-int4": _on_clients("algorithm=fedavg", "update_compression=int4"),
    "fedavg-topk": _on_clients("algorithm=fedavg", "update_compression=topk"),
    "fedavg-powersgd": _on_clients("algorithm=fedavg", "update_compression=powersgd"),
    "streaming-int8": _on_clients(*STREAMING, "round.steps=8", "update_compression=int8"),
    # Inside a silo
    "gradients-bf16": _on_replicas("gradient_compression=bf16"),
    "gradients-fp16": _on_replicas("gradient_compression=fp16"),
    "gradients-int8": _on_replicas("gradient_compression=int8"),
    "gradients-powersgd": _on_replicas("gradient_compression=powersgd", "gradient_compression.start=3"),
    "silos-3-1": Configuration(("algorithm=fedavg", "silos=[3,1]", "clients=4", "partition=dirichlet"), ranks=4),
    "silos-3-1-int8": Configuration(
        ("algorithm=fedavg", "silos=[3,1]", "clients=4", "update_compression=int8", "gradient_compression=int8"),
        ranks=4,
    ),
    # The server
    "server-nesterov": _on_clients("algorithm=fedavg", "server=nesterov"),
    "server-adam": _on_clients(*ADAM),
    "server-adam-blocks": _on_clients(*NOISY, *ADAM, "round.steps=8"),  # longer than a block of the server's vector
    # Models, precision, data
    "bf16": _on_replicas("precision=bf16"),
    "fp16": _on_replicas("precision=fp16", "gradient_compression=fp16", "round.steps=6"),  # slow on CPUs
    "dropout": _on_clients(*SMALL_GPT, "algorithm=fedavg", "partition=iid", "model.dropout=0.2"),
    "muon": _on_replicas(*SMALL_GPT, "optimizer=muon", "schedule=cosine", "round.steps=12"),
    "batchnorm": _on_clients("algorithm=fedavg", "model.norm=batch"),
    "transforms": _on_clients(
        "algorithm=fedavg", "transforms=[crop,flip,standardise,mixup]", "client_shift=[noise,labels]"
    ),
    # Clients
    "cohort": Configuration(
        (
            "algorithm=fedavg",
            "silos=2",
            "clients=7",
            "partition=dirichlet",
            "client_sampling=sample",
            "client_sampling.clients_per_round=3",
        )
    ),
    "one-rank": Configuration(("algorithm=fedavg", "clients=7", "partition=shards", "round.epochs=[1,3]"), ranks=1),
    "personal-head": _on_clients(*PERSONAL_HEAD),
    # Steps
    "bounded": _on_clients(*BOUNDED),
    "ema-clip": _on_clients("algorithm=fedavg", "ema_decay=0.9", "clip.max_norm=0.5"),
    "accumulation": _on_replicas("micro_batch_size=6"),
    # Interrupted in the middle of a round, and resumed
    "resumed-sync": _interrupted("algorithm=sync", "optimizer=momentum", "optimizer.lr=0.02", "round.steps=150"),
    "resumed-adam": _interrupted(
        *ADAM,
        "silos=2",
        "clients=5",
        "client_sampling=sample",
        "client_sampling.clients_per_round=3",
        "optimizer.lr=0.05",
        "round.steps=150",
    ),
    "resumed-streaming": _interrupted(
        *STREAMING, "silos=2", "clients=3", "update_compression=int8", "optimizer.lr=0.001", "round.steps=150"
    ),
}

Run = dict[str, Any]  # {"sha256": {file: hash}, "numbers": {metric: value}}
Runs = dict[str, Run]  # by the name of the configuration


def main() -> int:
    """Return 0 if every run finished and equals that of the table to compare with, if there is one."""
    options = _options()
    failed: list[str] = []
    if not options.reuse:
        runs, failed = _train_all(options.only, options.jobs)
        options.table.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    if options.compare and not failed:
        failed = _compare(options)
    return 1 if failed else 0


def differences(old: Runs, new: Runs, names: Iterable[str], renamed: Mapping[str, str]) -> dict[str, list[str]]:
    """Compare two tables.

    Args:
        old: the runs of the old table by the name of their configuration.
        new: the runs of the new table.
        names: the configurations to compare.
        renamed: the names in `new` of metrics that have another name in `old`.

    Returns:
        The differences of each configuration that is not the same in both.
    """
    found = {name: _differences_of_run(old.get(name), new.get(name), renamed) for name in names}
    return {name: lines for name, lines in found.items() if lines}


def _differences_of_run(old: Run | None, new: Run | None, renamed: Mapping[str, str]) -> list[str]:
    if old is None or new is None:
        return [f"missing in the {'old' if old is None else 'new'} table"]
    numbers = {renamed.get(name, name): value for name, value in old["numbers"].items()}
    return [
        *_differing_values(old["sha256"], new["sha256"]),
        *_differing_values(numbers, new["numbers"]),
    ]


def _differing_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    pairs = {name: (before, new.get(name, "missing")) for name, before in old.items()}
    return [f"{name}: {before} -> {after}" for name, (before, after) in pairs.items() if before != after]


def _compare(options: argparse.Namespace) -> list[str]:
    """Print which configurations differ from those of the old table, and return their names."""
    old, new = (json.loads(path.read_text()) for path in (options.compare, options.table))
    if old["machine"] != new["machine"]:
        print(f"The machines differ, and so may the bits:\n  {old['machine']}\n  {new['machine']}")
    names = options.only or list(old["runs"])
    found = differences(old["runs"], new["runs"], names, dict(options.renamed))
    for name, lines in found.items():
        print(f"{name} differs:", *lines, sep="\n  ")
    print(f"{len(names) - len(found)} of {len(names)} equal")
    return list(found)


def _train_all(only: list[str], jobs: int) -> tuple[Runs, list[str]]:
    """Train configurations, `jobs` at a time; return the finished runs, and the names of the others."""
    names = only or list(CONFIGURATIONS)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        text = Path(folder) / "text.txt"
        text.write_text(_made_up_text())
        found = dict(zip(names, pool.map(lambda name: _train(name, Path(folder), text), names), strict=True))
    runs = {name: run for name, run in found.items() if run is not None}
    failed = [name for name in names if name not in runs]
    print(f"{len(runs)} of {len(names)} runs ended well, after {time.monotonic() - began:.0f} s", flush=True)
    return runs, failed


def _train(name: str, folder: Path, text: Path) -> Run | None:
    """Train one configuration and read its results; if it failed, return None and its last output."""
    began = time.monotonic()
    configuration, run_dir, output = CONFIGURATIONS[name], folder / name, folder / f"{name}.log"
    overrides = [override.replace("TEXT", str(text)) for override in configuration.overrides]
    fixed = [
        "rounds=2",
        f"launch.nproc_per_node={configuration.ranks}",
        "launch.threads_per_worker=1",
        "launch.device=cpu",
    ]
    command = [sys.executable, "-m", "trainer", *fixed, *overrides, f"run_dir={run_dir}"]
    fault = _interrupt(command, output, run_dir) if configuration.is_interrupted else None
    if fault is None and (code := _start(command, output).wait()):
        fault = f"exit code {code}"
    if fault:
        lines = output.read_text().splitlines()[-LAST_LINES:]
        print(f"{name:<20} {fault}", *lines, sep="\n  ", flush=True)
        return None
    run = _read(run_dir)
    print(f"{name:<20} {run['sha256']['model.safetensors'][:16]}  {time.monotonic() - began:5.1f} s", flush=True)
    return run


def _start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def _interrupt(command: list[str], output: Path, run_dir: Path) -> str | None:
    """Start a run and preempt it in the middle of its second round; return the error, if there was one."""
    process = _start(command, output)
    while not _has_saved_in_round(run_dir):
        if process.poll() is not None:
            return f"ended with exit code {process.returncode} before it saved in the middle of a round"
        time.sleep(SECONDS_BETWEEN_LOOKS)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != PREEMPTED or not _has_saved_in_round(run_dir):
        return f"was to leave in the middle of a round, but ended with exit code {code}"
    return None


def _has_saved_in_round(run_dir: Path) -> bool:
    """Return whether there is a checkpoint in the middle of the second round, and none at its end."""
    rounds = sorted((run_dir / "checkpoints").glob("round-*"))
    return bool(rounds) and rounds[-1].name == "round-000001" and any(rounds[-1].glob("silo-*/step-*"))


def _read(run_dir: Path) -> Run:
    result = json.loads((run_dir / "result.json").read_text())
    return {
        "sha256": {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(run_dir.glob("*.safetensors"))},
        "numbers": {name: value for name, value in result.items() if not is_of_the_machine(name)},
    }


def _made_up_text() -> str:
    """Return about 10,000 letters of a language of 40 words."""
    random = Random(0)
    words = ["".join(random.choices("aeioklmnst", k=random.randint(2, 7))) for _ in range(40)]
    return " ".join(random.choices(words, k=1800))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the JSON file that the table is written to")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="the table to compare with")
    parser.add_argument("--renamed", type=_pair, nargs="+", default=[], metavar="OLD=NEW", help="names of metrics")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=CONFIGURATIONS, metavar="NAME", help="the configurations to train"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--reuse", action="store_true", help="train nothing, and read the table")
    return parser.parse_args()


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise argparse.ArgumentTypeError(f"{text} is not of the form OLD=NEW")
    return old, new


if __name__ == "__main__":
    sys.exit(main())
