"""Hydra's sweepers and launchers: their settings, checks and defaults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer.commands.sweep.job import assign
from trainer.config.compose import COMPOSITION_ERRORS
from trainer.config.groups import CONF
from trainer.distributed.launch.subprocesses import command_output
from trainer.loggers import higher_is_better
from trainer.utils.text import suggest

# Hydra looks for plugins in the namespace package hydra_plugins only; this folder has a part of it.
sys.path.append(str(Path(__file__).parent / "plugin"))

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
LOCAL = "hydra_plugins.silotrain.LocalLauncher"
PACKAGES = {
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
}
MAX_REQUEUES = 100  # of a SLURM job that reaches its time limit
MAX_NAME_LENGTH = 1024  # of a SLURM job


def hydra_context() -> Any:
    """Return Hydra's context, which reads conf/ and knows the local launcher."""
    node = {"_target_": LOCAL, "jobs": 1, "part": None}
    ConfigStore.instance().store(group="hydra/launcher", name="local", node=node, provider="silotrain")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return GlobalHydra.instance().hydra


def read_settings(overrides: Sequence[str]) -> DictConfig:
    """Return Hydra's part of the configuration.

    Raises ValueError for invalid overrides.
    """
    for override in overrides:
        if override in PACKAGES and not find_spec(f"hydra_plugins.{PACKAGES[override]}"):
            raise ValueError(f"{override} needs a package that is not installed\n  pip install 'silotrain[sweep]'")
    try:
        settings = _composed(overrides)
    except ValueError as error:
        raise ValueError(_unknown_keys(overrides) or str(error)) from error
    if settings.launcher._target_ == LOCAL:
        _check_local(settings)
    elif settings.runtime.choices["hydra/launcher"] == "submitit_slurm":
        _check_slurm(settings.launcher.partition, settings.launcher.name)
    return settings


def _composed(overrides: Sequence[str]) -> DictConfig:
    try:
        return hydra_context().compose_config("sweep", list(overrides), RunMode.MULTIRUN).hydra
    except COMPOSITION_ERRORS as error:
        raise ValueError(str(error)) from error


def _unknown_keys(overrides: Sequence[str]) -> str:
    """Return errors of overrides that set unknown keys, empty for none.

    Raises:
        ValueError: there is no such sweeper or launcher.
    """
    settings = _composed([override for override in overrides if override.startswith("hydra/")])
    errors: list[str] = []
    for key in (override.partition("=")[0] for override in overrides):
        section, _, name = key.rpartition(".")
        siblings = OmegaConf.select(OmegaConf.create({"hydra": settings}), section) if section else None
        if isinstance(siblings, DictConfig) and name not in siblings:
            valid = [f"{section}.{sibling}" for sibling in map(str, siblings) if sibling != "_target_"]
            errors.append(f"{key} is not a key{suggest(key, valid)}")
    return "\n".join(errors)


def _check_local(settings: DictConfig) -> None:
    jobs, part = settings.launcher.jobs, settings.launcher.part
    errors: list[str] = []
    if type(jobs) is not int or jobs < 1:
        errors.append(f"hydra.launcher.jobs={jobs}\n  valid: a whole number from 1")
    if part is not None:
        numbers = list(part) if not isinstance(part, str) else []
        if [type(number) for number in numbers] != [int, int] or not 0 <= numbers[0] < numbers[1]:
            errors.append(f"hydra.launcher.part={part}\n  valid: [0,8] to [7,8] for the eight parts of a sweep")
        if settings.sweeper._target_ != GRID:
            errors.append(f"hydra.launcher.part={part} with a sweeper that chooses its jobs itself\n  leave it out")
    if errors:
        raise ValueError("\n".join(errors))


def _check_slurm(partition: str | None, name: str) -> None:
    """Check what sbatch would refuse, before there is a job."""
    output = command_output("sinfo", "--noheader", "--format=%R")
    if output is None:
        raise ValueError(
            "hydra/launcher=submitit_slurm: sinfo is not installed, or SLURM does not answer\n"
            "  start the sweep on a node of the cluster, or leave this out to run the jobs on this machine"
        )
    valid = list(dict.fromkeys(output.split()))
    errors: list[str] = []
    for wanted in partition.split(",") if partition else ():
        if wanted not in valid:
            errors.append(f"hydra.launcher.partition={wanted}: no such partition{suggest(wanted, valid)}")
    if len(name) > MAX_NAME_LENGTH:
        errors.append(f"hydra.launcher.name has {len(name)} characters\n  valid: {MAX_NAME_LENGTH} at most")
    if errors:
        raise ValueError("\n".join(errors))


def defaults(settings: DictConfig, sweep: Path, objective: str, constant: Sequence[str]) -> list[str]:
    """Return the overrides that precede those of the user.

    Configuration files cannot extend the defaults of Hydra's plugins.

    Args:
        settings: Hydra's part of the configuration.
        sweep: folder of the sweep.
        objective: metric that compares jobs.
        constant: keys that are the same in all jobs.
    """
    choices = settings.runtime.choices
    keys = ",".join(f"'{key}'" for key in constant)
    chosen = [f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"]
    if choices["hydra/launcher"] == "submitit_slurm":
        # A requeued job resumes by itself, from its run folder.
        chosen += [
            assign("hydra.launcher.name", sweep.name[:MAX_NAME_LENGTH]),
            f"hydra.launcher.max_num_timeout={MAX_REQUEUES}",
            "+hydra.launcher.additional_parameters.requeue=true",
        ]
    if choices["hydra/sweeper"] == "optuna":
        chosen += _of_optuna(settings, objective)
    return chosen


def _of_optuna(settings: DictConfig, objective: str) -> list[str]:
    direction = "maximize" if higher_is_better(objective) else "minimize"
    # A failed job counts as a failed trial, and does not end the study.
    chosen = [f"hydra.sweeper.direction={direction}", "hydra.sweeper.max_failure_rate=1.0"]
    if settings.launcher._target_ == LOCAL:
        chosen.append("hydra.sweeper.n_jobs=${hydra.launcher.jobs}")
    if "seed" in settings.sweeper.sampler:
        chosen.append("hydra.sweeper.sampler.seed=0")  # the same command proposes the same trials, and so resumes
    return chosen
