"""Random combinations of choices: each run is stopped twice, killed once, and must end like an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from scripts.chaos.cases import COMMON
from scripts.chaos.compare import differences
from scripts.chaos.watch import Watched, under_way
from trainer.config.compose import compose_tree

PREEMPTED = 75  # the exit code of a run that was stopped
START_TIMEOUT_SECONDS = 300  # of a start that takes some seconds: its ranks wait for each other
ROUNDS = 4
CLIENTS = 6

# By algorithm: whether its updates can be compressed, and whether it has a server optimizer to choose.
ALGORITHMS = {
    "sync": (False, False),
    "fedavg": (True, True),
    "fedprox": (True, True),
    "fednova": (True, True),
    "scaffold": (True, False),
    "feddyn": (True, False),
    "diloco": (True, True),
    "streaming": (True, True),
    "delayed": (True, True),
    "averaging": (False, False),
    "median": (False, False),
    "trimmed_mean": (False, False),
    "krum": (False, False),
    "local": (False, False),
}
LINEAR = ("scaffold", "fednova")  # need an optimizer whose step is linear in the gradient
SERVERS = ("average", "momentum", "nesterov", "adam", "fedadam", "fedyogi", "fedadagrad")
LAYOUTS = ((2, "2"), (2, "1"), (3, "[2,1]"), (4, "[2,2]"))  # ranks and silos
TRANSFORMS = ("[]", "[standardise]", "[crop,flip]", "[crop,standardise,cutout]", "[mixup]")


@dataclass(frozen=True)
class Moment:
    """A moment of one start of a run: when a rank has made this number of steps."""

    rank: int
    steps: int


@dataclass(frozen=True)
class Combination:
    """A run to disturb.

    Attributes:
        overrides: of the configuration.
        ranks: the number of workers.
        stops: when it is asked to stop, in its first and in its second start.
        kill: when a worker is killed, in its third start.
    """

    overrides: tuple[str, ...]
    ranks: int
    stops: tuple[Moment, Moment]
    kill: Moment


def draw(random: Random) -> Combination:
    """Draw a combination that the configuration accepts."""
    algorithm = random.choice(list(ALGORITHMS))
    can_compress, has_server = ALGORITHMS[algorithm]
    is_sync = algorithm == "sync"
    ranks, silos = (2, "1") if is_sync else random.choice(LAYOUTS)
    steps = random.randint(4, 9)
    chosen = {
        "algorithm": algorithm,
        "silos": silos,
        "clients": str(CLIENTS),
        "partition": random.choice(("iid", "dirichlet", "quantity", "shards")),
        "rounds": str(ROUNDS),
        "round.steps": str(steps),
        "batch_size": "16",
        "seed": str(random.randrange(1000)),
        "optimizer": random.choice(
            ("sgd", "momentum") if algorithm in LINEAR else ("sgd", "momentum", "adamw", "nadam")
        ),
        "optimizer.lr": "0.01",
        "schedule": random.choice(("constant", "cosine")),
        "precision": random.choice(("fp32", "bf16", "fp16")),
        "transforms": random.choice(TRANSFORMS),
        "ema_decay": "null" if algorithm == "local" else random.choice(("null", "0.9")),
        "micro_batch_size": random.choice(("null", "3")),
        "gradient_compression": random.choice(("fp32", "bf16", "fp16", "int8", "powersgd")),
        "eval.every_rounds": random.choice(("1", "2")),
        "eval.personal_steps": "0" if is_sync else random.choice(("0", "2")),
        "checkpoint.every_rounds": random.choice(("1", "2")),
        "checkpoint.every_seconds": "0.05",
    }
    if chosen["gradient_compression"] == "powersgd":
        chosen["gradient_compression.start"] = "2"
    if can_compress:
        chosen["update_compression"] = random.choice(("fp32", "bf16", "fp16", "int8", "int4", "topk", "powersgd"))
    if has_server:
        chosen["server"] = random.choice(SERVERS)
    if algorithm == "streaming":
        chosen |= {
            "algorithm.fragments": str(random.randint(1, 3)),
            "algorithm.overlap_steps": str(random.randint(0, 3)),
        }
    if algorithm not in ("sync", "krum") and random.random() < 0.5:
        chosen |= {
            "client_sampling": "sample",
            "client_sampling.clients_per_round": str(random.randint(2, CLIENTS - 1)),
        }
    if algorithm == "fedavg" and random.random() < 0.3:
        chosen["algorithm.shared_params"] = "layers.1"
    first, second, third = (Moment(random.randrange(ranks), random.randint(1, 2 * steps)) for _ in range(3))
    return Combination(tuple(f"{key}={value}" for key, value in chosen.items()), ranks, (first, second), third)


def disturb_all(count: int, seed: int, folder: Path) -> list[str]:
    """Draw combinations and run them, print each, and return the differences that were found."""
    errors: list[str] = []
    for number in range(count):
        combination = draw(Random(f"{seed}-{number}"))
        began = time.monotonic()
        codes, found = _disturb(combination, folder / str(number))
        verdict = "NOT EQUAL" if found else "equal"
        ended = f"{number}: {verdict}, {time.monotonic() - began:.0f} s, exit codes {codes}"
        print(f"{ended}: {' '.join(combination.overrides)}", flush=True)
        errors += [f"combination {number}: {error}" for error in found]
        if not found:
            shutil.rmtree(folder / str(number))
    return errors


def _disturb(combination: Combination, folder: Path) -> tuple[list[int | None], list[str]]:
    """Run a combination undisturbed, and stopped twice and killed once; return the exit codes and the differences."""

    def stop(run: Watched, rank: int) -> None:
        assert run.launcher.pid is not None
        os.kill(run.launcher.pid, signal.SIGTERM)

    def kill(run: Watched, rank: int) -> None:
        run.kill(rank)

    alone, disturbed = folder / "alone", folder / "disturbed"
    codes = [_start(combination, alone)]
    codes += [_start(combination, disturbed, moment, stop) for moment in combination.stops]
    codes.append(_start(combination, disturbed, combination.kill, kill))
    if codes[0] != 0 or codes[-1] != 0 or any(code not in (0, PREEMPTED) for code in codes):
        return codes, [f"a start failed: {folder}"]
    return codes, differences(alone, disturbed)


def _start(
    combination: Combination,
    folder: Path,
    moment: Moment | None = None,
    strike: Callable[[Watched, int], None] = lambda run, rank: None,
) -> int | None:
    """Start the run once, and strike at the moment; return its exit code, None if it hangs."""
    tree = compose_tree([*_common(combination.ranks), *combination.overrides, f"run_dir={folder}"])
    with under_way(tree, folder, combination.ranks, forked=True) as run:
        if moment and run.wait_for_start() and run.wait(lambda: _steps(run, moment.rank) >= moment.steps):
            strike(run, moment.rank)
        deadline = run.began + START_TIMEOUT_SECONDS
        if run.wait(lambda: time.monotonic() > deadline, pause=0.05):
            return None
    return run.launcher.exitcode


def _common(ranks: int) -> Sequence[str]:
    return [*COMMON, f"launch.nproc_per_node={ranks}", "+model.width=32"]


def _steps(run: Watched, rank: int) -> int:
    pid = run.workers().get(rank)
    return 0 if pid is None else run.mark(rank, pid).steps
