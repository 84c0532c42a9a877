"""`python -m trainer doctor`: starts the workers that a run would start, and lets them look around instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trainer.commands.doctor.checks import diagnose
from trainer.commands.doctor.console import show
from trainer.commands.doctor.examine import survey_hosts
from trainer.commands.probe.workers import launch_workers, run_worker
from trainer.commands.train.launcher import FAILED, FINISHED
from trainer.config.compose import compose_tree
from trainer.config.schema import Config, read_config
from trainer.distributed.environment import ClusterEnvironment, check_launcher, check_world, is_worker

USAGE = """\
python -m trainer doctor [key=value ...]                        looks at what a run with these overrides would use
torchrun --nproc-per-node 4 -m trainer doctor [key=value ...]   the same with workers that torchrun starts; or srun

Every rank says what it finds: host, interface, versions, clock, threads and cores, memory, disk, GPU. Then the links
are measured, and what would go wrong is said with the way out. docs/doctor.md has the list.

Exit codes: 0 nothing would go wrong, 1 something would, 2 bad input."""


def main(arguments: Sequence[str]) -> int:
    """The exit code of the launcher, or of one worker. Raises ValueError for bad input that the launcher finds."""
    arguments = list(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    if is_worker(arguments):
        check_world()
        return run_worker(arguments, _run_checks)
    tree = compose_tree(arguments)
    check_launcher(tree["launch"]["nodes"])
    return launch_workers(tree, read_config(tree).launch, ("-m", "trainer", "doctor"))


def _run_checks(tree: dict[str, Any], environment: ClusterEnvironment, store: Any) -> int:
    """The exit code, on rank 0 when it has printed what was found."""
    config: Config = read_config(tree)
    exam = survey_hosts(config, environment, store)
    if environment.rank:
        return FINISHED
    found = diagnose(exam, config, tree)
    show(exam, found, Console())
    return FAILED if any(finding.is_error for finding in found) else FINISHED
