"""`python -m trainer evaluate`: starts workers that evaluate, and prints the figures."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from trainer.checkpoint.files import write_text
from trainer.commands.evaluate.console import show
from trainer.commands.evaluate.evaluation import Evaluation, evaluate_subject, fitting_silos
from trainer.commands.evaluate.subject import Subject, find_subject
from trainer.commands.exit_codes import FINISHED
from trainer.commands.options import Parser
from trainer.commands.output_file import check_output
from trainer.commands.probe.workers import launch_workers, run_worker
from trainer.config.compose import compose_tree
from trainer.config.saved_model import Weights
from trainer.config.schema import read_config
from trainer.distributed.environment import check_launcher, is_worker
from trainer.distributed.launch.processes import TRAINER
from trainer.distributed.peers import Peers

USAGE = """\
python -m trainer evaluate RUN [key=value ...]                  exact figures of a finished run
python -m trainer evaluate MODELS/NAME[/VERSION] [key=value ...]   the same of an exported version, by its engine
python -m trainer evaluate WEIGHTS [key=value ...]              of a file of weights, in a model that the keys describe
torchrun --nproc-per-node 4 -m trainer evaluate ...             with workers that torchrun or srun starts

The configuration is that of the run, with these overrides: other data, or launch.nproc_per_node=4. The examples are
prepared by what the run has measured of its training examples, and their labels numbered as it has numbered them.
Nothing is written into the run folder.

  --weights last|best|ema   of the run: those at its end, of its best round, or averaged; default: last
  --all                     all examples of the data are test examples, those of training too
  --json FILE               write all figures, by the names of result.json
  --overwrite               replace FILE, if there is one

Exit codes: 0 finished, 1 failed, 2 bad input."""

COMMAND = "evaluate"


def main(arguments: Sequence[str]) -> int:
    """Run the launcher or one worker, and return its exit code.

    Raises ValueError for bad input that the launcher finds.
    """
    options, typed = _parse(arguments)
    subject = find_subject(options.model, options.weights, typed)
    overrides = subject.overrides(typed)
    if is_worker(overrides):
        return run_worker(overrides, partial(_evaluate, options, subject, typed))
    check_output("--json", options.json, options.overwrite)
    tree = compose_tree(overrides)
    check_launcher(tree["launch"]["nodes"])
    return launch_workers(tree, read_config(tree).launch, (*TRAINER, COMMAND, *arguments))


def _parse(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the options, and the overrides of the configuration."""
    parser = Parser("python -m trainer evaluate")
    parser.add_argument("model", type=Path)
    parser.add_argument("--weights", choices=get_args(Weights), default="last")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_known_args(arguments)


def _evaluate(options: Namespace, subject: Subject, typed: Sequence[str], tree: dict[str, Any], peers: Peers) -> int:
    """Evaluate, and print the figures on rank 0; the exit code."""
    config = read_config(tree)
    is_chosen = any(override.startswith("silos=") for override in typed)
    silos = config.silos if is_chosen else fitting_silos(config, peers)
    found = evaluate_subject(subject, config, peers, options.all, silos)
    if peers.rank == 0:
        show(subject.title, found, Console())
        if options.json:
            write_text(options.json, to_json(found))
    return FINISHED


def to_json(found: Evaluation) -> str:
    """Return all figures as JSON; those that are not finite are null."""
    figures: dict[str, float] = {f"{name}/examples": count for name, count in found.examples.items()} | found.metrics
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return json.dumps(finite, indent=1) + "\n"
