"""The command line: Hydra's overrides in, an exit code out. 0: finished, 1: failed, 2: bad input, 75: preempted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from trainer.commands.train.launcher import BAD_INPUT, CODES, FINISHED, RESOLVED, launch
from trainer.distributed.environment import check_launcher, check_world, detect_environment, is_main_process, is_worker


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `python -m trainer` with these arguments, or of one worker that torchrun or srun started."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["report"]:
        from trainer.commands import report

        return _run_command(report.main, arguments[1:])
    if arguments[:1] == ["doctor"]:
        from trainer.commands import doctor

        return _run_command(doctor.main, arguments[1:])
    if arguments[:1] == ["partition"]:
        from trainer.commands import partition

        return _run_command(partition.main, arguments[1:])
    if arguments[:1] == ["plan"]:
        from trainer.commands import plan

        return _run_command(plan.main, arguments[1:])
    if "-m" in arguments or "--multirun" in arguments:
        from trainer.commands import sweep

        return sweep.main([argument for argument in arguments if argument not in ("-m", "--multirun")])
    if is_worker(arguments):
        return _run_worker(arguments)
    from trainer.config.compose import compose_tree, help_page

    if "--help" in arguments or "-h" in arguments:
        print(help_page())
        return FINISHED
    try:
        if "--cfg" in arguments:
            overrides = [argument for argument in arguments if argument not in ("--cfg", "job")]
            print(yaml.safe_dump(compose_tree(overrides), sort_keys=False), end="")
            return FINISHED
        tree = compose_tree(arguments)
        check_launcher(tree["launch"]["nodes"])
        return launch(tree)
    except ValueError as error:
        return _print_error(error)


def _run_command(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of one of the other commands."""
    try:
        return command(arguments)
    except ValueError as error:
        return _print_error(error)


def _run_worker(overrides: list[str]) -> int:
    """The exit code of a worker. torchrun would start a failed one again, and report every rank: it gets 0."""
    from trainer.commands.train import worker

    try:
        check_world()
    except ValueError as error:
        _print_error(error)
        return FINISHED
    status = worker.main(lambda: _compose(overrides))
    return CODES[status] if detect_environment().launched_by == "srun" else FINISHED


def _print_error(error: ValueError) -> int:
    """Says it, once for all processes that find the same."""
    if is_main_process():
        print(error, file=sys.stderr, flush=True)
    return BAD_INPUT


def _compose(overrides: list[str]) -> dict[str, Any]:
    if RESOLVED in os.environ:
        return json.loads(os.environ[RESOLVED])
    from trainer.config.compose import compose_tree

    return compose_tree(overrides)
