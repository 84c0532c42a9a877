"""The command line: Hydra's overrides in, an exit code out. 0: finished, 1: failed, 2: bad input, 75: preempted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import yaml

from trainer.launcher import BAD_INPUT, FINISHED, RESOLVED, launch


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `python -m trainer` with these arguments, or of one worker under torchrun."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "RANK" in os.environ:
        return _work(arguments)
    from trainer.compose import compose_tree, help_page

    if "--help" in arguments or "-h" in arguments:
        print(help_page())
        return FINISHED
    try:
        if "--cfg" in arguments:
            overrides = [argument for argument in arguments if argument not in ("--cfg", "job")]
            print(yaml.safe_dump(compose_tree(overrides), sort_keys=False), end="")
            return FINISHED
        return launch(compose_tree(arguments))
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT


def _work(overrides: list[str]) -> int:
    from trainer import worker

    if RESOLVED in os.environ:
        worker.main(lambda: json.loads(os.environ[RESOLVED]))
    else:
        from trainer.compose import compose_tree

        worker.main(lambda: compose_tree(overrides))
    return FINISHED
