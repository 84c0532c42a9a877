"""The command line: options, a command or Hydra's overrides in, an exit code out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

import yaml

from trainer import __version__
from trainer.commands.exit_codes import BAD_INPUT, CODES, FINISHED
from trainer.distributed.environment import check_launcher, check_world, detect_environment, is_main_process, is_worker
from trainer.utils.text import suggest

# Packages, imported when they are typed. The module `main` of each has USAGE, and a function `main` that takes the
# other arguments and returns the exit code.
COMMANDS = (
    *("report", "doctor", "partition", "plan", "tokenize", "evaluate", "export", "predict", "serve"),
    *("certify", "coordinator"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or one worker that torchrun, srun or the launcher has started.

    Args:
        arguments: those of the command; None: those of this process.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 75 preempted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from trainer.commands.options import expand_config_options

        if arguments and arguments[0] in COMMANDS:
            command = import_module(f"trainer.commands.{arguments[0]}.main")
            if "--help" in arguments or "-h" in arguments:
                print(command.USAGE)
                return FINISHED
            return command.main(expand_config_options(arguments[1:]))
        _check_command(arguments[:1])
        return _run(expand_config_options(arguments))
    except ValueError as error:
        return _print_error(error)


def _check_command(first: Sequence[str]) -> None:
    """Raise ValueError if the command line begins with a word that is probably a misspelt command."""
    from trainer.config.advice import find_choice

    for word in first:
        meant = get_close_matches(word, COMMANDS, n=1) if word.isalpha() and not find_choice(word) else []
        if meant:
            raise ValueError(f"{word} is no command{suggest(word, COMMANDS, meant[0])}")


def _run(arguments: list[str]) -> int:
    from trainer.commands.options import parse
    from trainer.config.groups import search_path_overrides
    from trainer.config.help import help_page

    options, overrides = parse(arguments)
    if options.multirun:
        if options.cfg or options.help is not None:
            raise ValueError("--cfg and --help cannot be combined with -m\n  leave -m out")
        from trainer.commands.sweep import main as sweep

        return sweep.main([*search_path_overrides(), *overrides])
    if is_worker(overrides):
        return _run_worker(overrides)
    if options.version:
        print(f"silotrain {__version__}")
        return FINISHED
    if options.help is not None:
        print(help_page(options.help))
        return FINISHED
    from trainer.config.compose import complete, compose_run, compose_tree  # with Hydra: most of the time of a start

    if options.shell_completion:
        complete(options.shell_completion)
    elif options.cfg:
        print(yaml.safe_dump(compose_tree(overrides), sort_keys=False), end="")
    else:
        from trainer.commands.train.launcher import launch
        from trainer.config.schema import read_config

        with compose_run(overrides, partial(_check_part, overrides)) as tree:
            if not options.quiet and [override.partition("=")[0] for override in overrides] == ["run_dir"]:
                print(f"{tree['run_dir']} holds no run: a new one begins, of the default configuration", flush=True)
            check_launcher(tree["launch"]["nodes"])
            if read_config(tree).site.is_simulation:
                from trainer.commands.train.simulation import simulate

                return simulate(tree, overrides)
            return launch(tree)
    return FINISHED


def _check_part(overrides: Sequence[str], tree: dict[str, Any]) -> None:
    """Check the part of this launch in a federation.

    Raises:
        ValueError: it is the coordinator, which has a command; or a worker is to start launches.
    """
    from trainer.config.schema import read_config

    site = read_config(tree).site
    if site.is_simulation and is_worker(overrides):
        raise ValueError(
            f"site.simulate={site.simulate} starts launches of its own\n"
            "  start it without torchrun or srun: python -m trainer ..."
        )
    if site.listen is not None and not site.is_simulation:
        raise ValueError(
            f"site.listen={site.listen}: the coordinator has a command of its own\n"
            f"  python -m trainer coordinator {shlex.join(sys.argv[1:])}"
        )


def _run_worker(overrides: list[str]) -> int:
    """Run a worker. Under torchrun its exit code is always 0: torchrun would restart a failed one, and report all."""
    from trainer.commands.train import worker
    from trainer.commands.train.launcher import own_texts, resolved_tree
    from trainer.config.compose import compose_run

    try:
        check_world()
    except ValueError as error:
        _print_error(error)
        return FINISHED
    check = partial(_check_part, overrides)
    with ExitStack() as stack:  # keeps a new run folder reserved
        made = partial(resolved_tree, lambda: stack.enter_context(compose_run(overrides, check)))
        status = worker.main(made, own_texts(overrides))
    return CODES[status] if detect_environment().launched_by == "srun" else FINISHED


def _print_error(error: ValueError) -> int:
    """Print it, once for all processes that find the same."""
    if is_main_process():
        print(error, file=sys.stderr, flush=True)
    return BAD_INPUT
