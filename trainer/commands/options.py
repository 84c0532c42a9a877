"""Options of the command line beside Hydra's overrides.

Options that workers and the jobs of a sweep need too are passed on by environment variables.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.config.groups import SEARCH_PATH
from trainer.config.overrides import file_overrides, literal
from trainer.config.saved import saved_overrides

QUIET, LOG_LEVEL = "SILOTRAIN_QUIET", "SILOTRAIN_LOG_LEVEL"
SEARCH_KEY = "hydra.searchpath="
LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are ValueErrors. It prints no help, and knows options by their whole names alone."""

    def __init__(self, command: str = "python -m trainer"):
        super().__init__(command, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n  see {self.prog} --help")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the options of a run; return them, and the overrides.

    Raises:
        ValueError: an option has no value, or an invalid one.
    """
    parser = Parser()
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="GROUP")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("--log-level", choices=LEVELS)
    parser.add_argument("-sc", "--shell-completion", metavar="install=bash")
    options, overrides = parser.parse_known_args(arguments)
    if options.quiet:
        os.environ[QUIET] = "1"
    if options.log_level:
        os.environ[LOG_LEVEL] = options.log_level.upper()
    return options, overrides


def expand_config_options(arguments: Sequence[str]) -> list[str]:
    """Replace --config FILE by the overrides in the file, and take out --config-dir DIR and hydra.searchpath=[...].

    The overrides of the file come first, so that those of the command line win. The environment keeps the folders.
    For `run_dir=` alone, the file is the configuration that the run folder has saved, if it has one.

    Raises:
        ValueError: a file or a folder does not exist, or the file is no YAML mapping.
    """
    parser = Parser()
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR")
    options, others = parser.parse_known_args(arguments)
    folders = [argument.removeprefix(SEARCH_KEY)[1:-1] for argument in others if argument.startswith(SEARCH_KEY)]
    if options.config_dir is not None:
        if not options.config_dir.is_dir():
            raise ValueError(f"--config-dir {options.config_dir}: there is no such folder\n  valid: a folder of yamls")
        folders.insert(0, literal(f"file://{options.config_dir.resolve()}"))
    if folders:
        os.environ[SEARCH_PATH] = ",".join(folders)
    others = [argument for argument in others if not argument.startswith(SEARCH_KEY)]
    saved = [] if options.config else saved_overrides(others)
    return [*saved, *(override for file in options.config for override in file_overrides(file)), *others]
