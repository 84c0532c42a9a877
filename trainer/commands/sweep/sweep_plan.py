"""Plan of a sweep: its command line, parsed and checked before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from trainer import tasks
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.sweep import grid, hydra_plugins
from trainer.commands.sweep.job import Job, assign, make_job
from trainer.config.compose import COMPOSITION_ERRORS, Tree, compose_tree, new_sweep_dir
from trainer.config.overrides import is_hydra_override
from trainer.distributed.launch.subprocesses import visible_gpus
from trainer.utils.errors import ErrorCollector
from trainer.utils.text import suggest

OTHER_METRICS = ("seconds", "examples_per_second", "tokens_per_second", "mfu", "bytes_between_silos")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that was checked.

    Attributes:
        folder: holds the run folders.
        overrides: for Hydra.
        jobs: of this process, where they are known before they run, as those of a grid are.
        objective: metric that compares jobs.
        launcher: Hydra's name of the launcher.
    """

    folder: Path
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...] | None
    objective: str
    launcher: str


def make_plan(arguments: Sequence[str]) -> SweepPlan:
    """Parse the arguments of a sweep.

    Raises ValueError with everything that is wrong with them.
    """
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise ValueError(f"{flags[0]} cannot be combined with -m\n  valid: key=value, key=value,value,...")
    hydra_overrides = [argument for argument in arguments if is_hydra_override(argument)]
    run_overrides = [
        argument for argument in arguments if not is_hydra_override(argument) and argument != "experiment=null"
    ]
    settings = hydra_plugins.read_settings(hydra_overrides)
    folder, swept = _pop_folder(_parse(settings, run_overrides))
    return _check(settings, folder, swept, hydra_overrides)


def _parse(settings: DictConfig, overrides: Sequence[str]) -> list[Override]:
    params = [f"{key}={value}" for key, value in (settings.sweeper.get("params") or {}).items()]
    try:
        return grid.parse([*params, *overrides])
    except COMPOSITION_ERRORS:
        compose_tree(list(overrides))  # raises an error that names the override
        raise


def _pop_folder(overrides: Sequence[Override]) -> tuple[Path | None, list[Override]]:
    """Return the folder of the sweep, if given, and the other overrides."""
    for override in overrides:
        if override.key_or_group in ("run_dir", "objective") and override.is_sweep_override():
            raise ValueError(f"{override.input_line}\n  valid: a single value, which is the same for the whole sweep")
    given = [override for override in overrides if override.key_or_group == "run_dir"]
    folder = next((override.value() for override in given), None)
    return Path(str(folder)) if folder else None, [override for override in overrides if override not in given]


def _check(settings: DictConfig, folder: Path | None, swept: list[Override], hydra_overrides: list[str]) -> SweepPlan:
    trees = _compose_all(grid.edges(swept))
    _check_sites(trees)
    objective = _objective(trees[0])
    folder = folder or new_sweep_dir(_common_name([tree["name"] for tree in trees]))
    constant = [override.get_key_element() for override in swept if not override.is_sweep_override()]
    if settings.launcher._target_ == hydra_plugins.LOCAL:
        _check_gpus(settings.launcher.jobs, trees)
    jobs = None
    if settings.sweeper._target_ == hydra_plugins.GRID:
        part = settings.launcher.get("part") or (0, 1)
        jobs = _jobs(grid.product(swept), trees, folder, constant)[part[0] :: part[1]]
    run_overrides = [override.input_line or "" for override in swept]
    fixed = [assign("run_dir", str(folder)), assign("objective", objective)]
    defaults = hydra_plugins.defaults(settings, folder, objective, [*constant, "objective"])
    launcher = settings.runtime.choices["hydra/launcher"]
    return SweepPlan(folder, (*defaults, *hydra_overrides, *run_overrides, *fixed), jobs, objective, launcher)


def _check_sites(trees: Sequence[Tree]) -> None:
    for key in ("name", "listen"):
        if given := next((tree["site"][key] for tree in trees if tree["site"][key] is not None), None):
            raise ValueError(
                f"site.{key}={given} with -m: the launches of a federation meet in one run\n"
                "  sweep on this machine: leave it out, and set site.simulate="
            )


def _check_gpus(num_jobs: int, trees: list[Tree]) -> None:
    gpus = len(visible_gpus())
    if 0 < gpus < num_jobs and any(tree["launch"]["device"] != "cpu" for tree in trees):
        raise ValueError(
            f"hydra.launcher.jobs={num_jobs} with {gpus} visible GPUs: each job needs one\n"
            f"  valid: at most {gpus}, or launch.device=cpu"
        )


def _jobs(combinations: list[grid.Overrides], trees: list[Tree], folder: Path, constant: list[str]) -> tuple[Job, ...]:
    """Return the jobs of these combinations.

    Raises ValueError with all that do not fit their run folders.
    """
    if len(combinations) > len(trees):
        print(f"checking {len(combinations)} jobs", flush=True)
        trees = _compose_all(combinations)
    jobs = tuple(make_job(overrides, folder, constant) for overrides in combinations)
    errors = ErrorCollector()
    for job, tree in zip(jobs, trees, strict=True):
        errors.collect(partial(RunDir(job.folder).check, {**tree, "run_dir": str(job.folder)}))
    errors.raise_any()
    return jobs


def _compose_all(combinations: list[grid.Overrides]) -> list[Tree]:
    """Return the configuration of each combination.

    Raises ValueError with all errors, each once.
    """
    trees: list[Tree] = []
    errors: dict[str, None] = {}
    for overrides in combinations:
        try:
            trees.append(compose_tree(list(overrides)))
        except ValueError as error:
            errors |= dict.fromkeys(re.split(r"\n(?! )", str(error)))  # further lines of an error are indented
    if errors:
        raise ValueError("\n".join(errors))
    return trees


def _objective(tree: Tree) -> str:
    """Return the metric that compares jobs, by default the task's own.

    The default is measured on the validation set.

    The test set is used only where there is no validation set.
    """
    name, target = tree["objective"], tree["task"]["_target_"]
    task = getattr(tasks, target.removeprefix("trainer.tasks."), None)
    if task is None:
        if name:
            return name
        raise ValueError(f"objective=null, and the task is {target}\n  set a metric of result.json, such as test/loss")
    metrics = dict.fromkeys((task.headline, *task.scores, "loss"))
    parts = ("validation", "test", "train") if tree["data"].get("validation") else ("test", "train")
    valid = [f"{part}/{metric}" for part in parts for metric in metrics]
    if name and name not in (*valid, *OTHER_METRICS):
        raise ValueError(f"objective={name} is not a metric of result.json{suggest(name, [*valid, *OTHER_METRICS])}")
    return name or valid[0]


def _common_name(names: list[str]) -> str:
    """Return the common part of names: digits, of digits-sync and digits-fedavg."""
    shared = names[0] if len(set(names)) == 1 else os.path.commonprefix(names).rpartition("-")[0]
    return shared or "several"
