"""The configuration that a run folder has saved: `run_dir=` alone continues the run, and commands evaluate it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.config.groups import find_groups
from trainer.config.overrides import file_overrides
from trainer.config.targets import check_saved_targets

# Keys about where and how a run was started, and what it wrote, which mean nothing to those who only read it.
OF_ITS_START = (
    *("run_dir", "require_shared_run_dir", "resume", "run", "loggers", "site"),
    *("launch.nodes", "launch.rdzv_endpoint", "launch.token_file", "launch.max_seconds"),
)


def saved_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of the run whose folder `run_dir=` alone names; none where others stand beside it.

    Args:
        arguments: of the command line, options among them.

    Raises:
        ValueError: the configuration there cannot be read, or names what is not to be called.
    """
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if len(overrides) != 1 or not overrides[0].startswith("run_dir=") or {"-m", "--multirun"} & {*arguments}:
        return []
    folder = RunDir(Path(os.path.expanduser(str(yaml.safe_load(overrides[0].partition("=")[2])))))
    if not folder.has_started():
        return []
    check_saved_targets(folder.settings(), folder.config)
    return [override for override in file_overrides(folder.config) if override != 'resume="never"']


def reading_overrides(file: Path, typed: Sequence[str]) -> list[str]:
    """Return the overrides of a saved configuration for a command that trains nothing, and behind them those typed.

    Of a group for which another choice is typed, nothing is kept.

    Args:
        file: the saved configuration.
        typed: overrides of the command line.

    Raises:
        ValueError: the file cannot be read, or names what is not to be called.
    """
    overrides = file_overrides(file)
    check_saved_targets(yaml.safe_load(file.read_bytes()), file)
    chosen = {override.partition("=")[0] for override in typed} & find_groups().keys()
    left_out = (*OF_ITS_START, *chosen)
    return [*(override for override in overrides if not _is_of(override, left_out)), *typed]


def _is_of(override: str, keys: Sequence[str]) -> bool:
    """Return whether an override sets one of these keys, or a key below one."""
    key = override.partition("=")[0].lstrip("+~")
    return any(key == name or key.startswith(f"{name}.") for name in keys)
