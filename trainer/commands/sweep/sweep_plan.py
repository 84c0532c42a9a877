"""What a sweep will do: read off its command line and checked, job by job, before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from trainer import tasks
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.sweep import grid, hydra_plugins, local_launcher
from trainer.commands.sweep.job import Job, assign, make_job
from trainer.config.compose import COMPOSITION_ERRORS, Tree, compose_tree, is_hydra_override, new_sweep_dir
from trainer.utils.text import suggest

OTHER_METRICS = ("seconds", "examples_per_second", "tokens_per_second", "mfu", "bytes_between_silos")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that was checked.

    folder: of its runs' folders. overrides: what Hydra is given. jobs: those of this process, if they are known before
    they run, which those of a grid are. objective: the figure by which jobs are compared. launcher: Hydra's name for
    what runs them.
    """

    folder: Path
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...] | None
    objective: str
    launcher: str


def make_plan(arguments: Sequence[str]) -> SweepPlan:
    """The sweep that these arguments describe; ValueError lists what is wrong with them."""
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise ValueError(f"{flags[0]} cannot be combined with -m\n  valid beside it: key=value, key=value,value,...")
    hydras = [argument for argument in arguments if is_hydra_override(argument)]
    own = [argument for argument in arguments if not is_hydra_override(argument) and argument != "experiment=null"]
    settings = hydra_plugins.read_settings(hydras)
    folder, swept = _pop_folder(_parsed(settings, own))
    return _checked(settings, folder, swept, hydras)


def _parsed(settings: DictConfig, own: Sequence[str]) -> list[Override]:
    params = [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items()]
    try:
        return grid.parse([*params, *own])
    except COMPOSITION_ERRORS:
        compose_tree(list(own))  # it says what cannot be read in which of them
        raise


def _pop_folder(overrides: Sequence[Override]) -> tuple[Path | None, list[Override]]:
    """The folder of the sweep, if it is given, and the other overrides."""
    for override in overrides:
        if override.key_or_group in ("run_dir", "objective") and override.is_sweep_override():
            raise ValueError(f"{override.input_line}: a sweep has one\n  give one value")
    given = [override for override in overrides if override.key_or_group == "run_dir"]
    folder = next((override.value() for override in given), None)
    return Path(str(folder)) if folder else None, [override for override in overrides if override not in given]


def _checked(settings: DictConfig, folder: Path | None, swept: list[Override], hydras: list[str]) -> SweepPlan:
    trees = _composed(grid.edges(swept))
    objective = _objective(trees[0])
    folder = folder or new_sweep_dir(_common_name([tree["name"] for tree in trees]))
    constant = [override.get_key_element() for override in swept if not override.is_sweep_override()]
    if settings.launcher._target_ == hydra_plugins.LOCAL:
        _check_gpus(settings.launcher.jobs, trees)
    jobs = None
    if settings.sweeper._target_ == hydra_plugins.GRID:
        part = settings.launcher.get("part") or (0, 1)
        jobs = _jobs(grid.product(swept), trees, folder, constant)[part[0] :: part[1]]
    own = [override.input_line or "" for override in swept]
    fixed = [assign("run_dir", str(folder)), assign("objective", objective)]
    defaults = hydra_plugins.defaults(settings, folder, objective, [*constant, "objective"])
    launcher = settings.runtime.choices["hydra/launcher"]
    return SweepPlan(folder, (*defaults, *hydras, *own, *fixed), jobs, objective, launcher)


def _check_gpus(at_a_time: int, trees: list[Tree]) -> None:
    gpus = len(local_launcher.visible_gpus())
    if 0 < gpus < at_a_time and any(tree["launch"]["device"] != "cpu" for tree in trees):
        raise ValueError(
            f"hydra.launcher.jobs={at_a_time}, and {gpus} GPUs are visible: each job wants one\n"
            f"  valid: {gpus} at most, or launch.device=cpu"
        )


def _jobs(combinations: list[grid.Overrides], trees: list[Tree], folder: Path, constant: list[str]) -> tuple[Job, ...]:
    """The jobs of these combinations; ValueError says which cannot be composed, or do not fit their run folders."""
    if len(combinations) > len(trees):
        print(f"checks {len(combinations)} jobs", flush=True)
        trees = _composed(combinations)
    jobs = tuple(make_job(overrides, folder, constant) for overrides in combinations)
    errors: list[str] = []
    for job, tree in zip(jobs, trees, strict=True):
        try:
            RunDir(job.folder).check({**tree, "run_dir": str(job.folder)})
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    return jobs


def _composed(combinations: list[grid.Overrides]) -> list[Tree]:
    """The configuration of each; ValueError lists what is wrong with them, each fault once."""
    trees: list[Tree] = []
    errors: dict[str, None] = {}
    for overrides in combinations:
        try:
            trees.append(compose_tree(list(overrides)))
        except ValueError as error:
            errors |= dict.fromkeys(re.split(r"\n(?! )", str(error)))  # what goes on with a fault is indented
    if errors:
        raise ValueError("\n".join(errors))
    return trees


def _objective(tree: Tree) -> str:
    """The name of the figure that counts: the one that was asked for, or the task's own on the validation set.

    The test set selects nothing, unless it is the only one.
    """
    name, target = tree["objective"], tree["task"]["_target_"]
    task = getattr(tasks, target.removeprefix("trainer.tasks."), None)
    if task is None:
        if name:
            return name
        raise ValueError(f"objective=null, and the task is {target}\n  set a figure of result.json, such as test/loss")
    figures = dict.fromkeys((task.headline, *task.scores, "loss"))
    parts = ("validation", "test", "train") if tree["data"].get("validation") else ("test", "train")
    valid = [f"{part}/{figure}" for part in parts for figure in figures]
    if name and name not in (*valid, *OTHER_METRICS):
        raise ValueError(f"objective={name} is no figure of a result{suggest(name, [*valid, *OTHER_METRICS])}")
    return name or valid[0]


def _common_name(names: list[str]) -> str:
    """What the names of the runs have in common: digits, of digits-sync and digits-fedavg."""
    shared = names[0] if len(set(names)) == 1 else os.path.commonprefix(names).rpartition("-")[0]
    return shared or "several"
