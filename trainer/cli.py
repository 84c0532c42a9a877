"""The command line: Hydra's overrides in, an exit code out. 0: finished, 1: failed, 2: bad input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.config import read_config
from trainer.folder import RunFolder

FINISHED, FAILED, BAD_INPUT = 0, 1, 2

# How the launcher hands the resolved configuration to the workers it starts, so that they need not compose it again.
RESOLVED = "SILOTRAIN_CONFIG"


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
        return _launch(arguments)
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


def _launch(overrides: list[str]) -> int:
    """Starts the workers of this machine and waits for them."""
    from trainer.compose import compose_tree

    tree = compose_tree(overrides)
    config = read_config(tree)
    folder = RunFolder(Path(tree["run_dir"]))
    folder.check(tree)
    from trainer.launch.torchrun import choose_nproc, choose_threads, run_workers
    from trainer.topology import silo_sizes

    nproc = choose_nproc(config.launch.nproc, config.launch.device)
    silo_sizes(config.silos, [0] * nproc)
    os.environ[RESOLVED] = json.dumps(tree)
    try:
        failure = run_workers(nproc, choose_threads(config.launch.threads, nproc))
    except KeyboardInterrupt:
        failure = {"error": "interrupted"}
    if failure:
        if "error" in failure and folder.path.exists():
            folder.set_status("crashed", **failure)
            print(f"{failure['error']}; go on with run_dir={folder.path}", file=sys.stderr)
        return FAILED
    # Workers end well when the run is finished, and when they found the input bad and have said so.
    return FINISHED if folder.status() == "finished" else BAD_INPUT
