"""The configuration that a run folder has saved: `run_dir=` alone continues the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from trainer.checkpoint.run_dir import RunDir
from trainer.config.overrides import file_overrides
from trainer.config.targets import check_saved_targets


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
