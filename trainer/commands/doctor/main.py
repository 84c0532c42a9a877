"""`python -m trainer doctor`: starts the workers that a run would start, and lets them look around instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from trainer.commands.doctor.checks import findings
from trainer.commands.doctor.console import show
from trainer.commands.doctor.examine import examine
from trainer.commands.probe.workers import send, work
from trainer.commands.train.launcher import FAILED, FINISHED
from trainer.config.compose import compose_tree
from trainer.config.schema import Config, read_config
from trainer.distributed.environment import Place, check_launcher, check_world, is_worker

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
        return work(arguments, _examined)
    tree = compose_tree(arguments)
    check_launcher(tree["launch"]["nodes"])
    return send(tree, read_config(tree).launch, ("-m", "trainer", "doctor"))


def _examined(tree: dict[str, Any], place: Place, store: Any) -> int:
    """The exit code, on rank 0 when it has printed what was found."""
    config: Config = read_config(tree)
    exam = examine(config, place, store)
    if place.rank:
        return FINISHED
    found = findings(exam, config, tree)
    show(exam, found, Console())
    return FAILED if any(finding.is_wrong for finding in found) else FINISHED
