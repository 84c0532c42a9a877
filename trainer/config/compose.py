"""From overrides to one resolved tree of plain values, with every fault said at once. Hydra's types stop here."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.renamed_keys import renamed
from trainer.config.schema import read_config
from trainer.distributed.environment import was_requeued
from trainer.utils.text import suggest
from trainer.utils.trees import flatten

Tree = dict[str, Any]

PACKAGE = Path(__file__).parents[1]
# In a source tree conf/ lies beside the package, in an installed one inside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.exists())

LIST_GROUPS = ("client_shift", "transforms", "loggers")  # groups of which there may be several choices, or none

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

USAGE = """\
python -m trainer [--help | --cfg job] [key=value ...]          start the workers of this machine, and train
torchrun --nproc-per-node 4 -m trainer [key=value ...]          the same with workers that torchrun starts
python -m trainer -m key=value,value ...                        a sweep: all combinations, one run each
python -m trainer report FOLDER ...                             runs side by side: a table, a page with curves
python -m trainer doctor [key=value ...]                        what would go wrong with such a run
python -m trainer plan [key=value ...]                          what it would cost: time, bytes, memory
python -m trainer partition [key=value ...]                     who would get which examples: a table, a picture
./scripts/train [key=value ...]                                 the first of these, installing what it needs

  python -m trainer                                             digits, a small CNN, synchronous, in half a minute
  python -m trainer algorithm=fedavg silos=2 partition=dirichlet partition.alpha=0.1
  python -m trainer run.smoke=true ...                          tries any configuration in a few seconds
  python -m trainer -m optimizer.lr=0.1,0.03 seed=1,2,3         six runs

Exit codes: 0 finished, 1 failed, 2 bad input, 75 told to leave: the same command goes on."""


def compose_tree(overrides: list[str]) -> Tree:
    """The resolved configuration, checked; ValueError lists all that is wrong with the overrides."""
    # Hydra takes no null for a group, though it is the default of this one.
    overrides = [override for override in overrides if override != "experiment=null"]
    try:
        if any(map(is_hydra_override, overrides)):
            raise ValueError("hydra.* is no part of the configuration")
        if any(map(_renamed_outside_groups, overrides)):
            raise ValueError("a key has another name")
        config = _compose(overrides)
    except COMPOSITION_ERRORS as error:
        raise ValueError("\n".join(_errors(overrides) or [str(error)])) from error
    choices = config.hydra.runtime.choices
    config = _without_hydra(config)
    if config.data.files and OmegaConf.is_missing(config.data, "path"):
        config.data.path = None
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError("\n".join(f"{key} has no value\n  set {key}=..." for key in missing))
    tree = _plain(config)
    read_config(tree)
    if tree["run"]["smoke"]:
        _make_smoke_run(tree)
    tree["name"] = tree["name"] or choices["experiment"] or f"{choices['data']}-{choices['algorithm']}"
    tree["run_dir"] = tree["run_dir"] or str(_new_run_dir(tree["name"]))
    if was_requeued() and tree["resume"] == "never":
        tree["resume"] = "auto"  # what is in the folder was written by this very job
    return tree


def _make_smoke_run(tree: Tree) -> None:
    """Makes it two rounds of one step, evaluated at the end. Here, so that config.yaml says what was run."""
    tree["rounds"] = 2
    tree["round"]["steps"] = 1
    tree["eval"]["every_rounds"] = 2
    tree["checkpoint"]["every_rounds"] = 1
    tree["stop"] = dict.fromkeys(tree["stop"])


def _compose(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def _without_hydra(config: DictConfig) -> DictConfig:
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return config


def help_page() -> str:
    """What can be said on the command line, read off the configuration itself."""
    groups = "\n".join(_wrapped(group, options) for group, options in _groups().items())
    spine = (CONF / "config.yaml").read_text().split("\n\n", maxsplit=1)[1].rstrip()
    keys = "\n".join("  " + line if line else "" for line in spine.split("\n"))
    title = "Groups (files in conf/; each has keys of its own, seen by --cfg job):"
    return f"{USAGE}\n\n{title}\n{groups}\n\nKeys:\n{keys}"


def _wrapped(group: str, options: list[str]) -> str:
    indent = " " * 25
    return textwrap.fill(", ".join(options), 120, initial_indent=f"  {group + '=':<23}", subsequent_indent=indent)


def _new_run_dir(name: str) -> Path:
    """outputs/<name>/<time>, or under SLURM the job's id, by which a requeued job finds its run again."""
    folder = Path("outputs") / name
    if job := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return folder / f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job := os.environ.get("SLURM_JOB_ID"):
        return folder / job
    return unused_path(folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


def new_sweep_dir(name: str) -> Path:
    """outputs/<name>/sweep-<time>, or under SLURM the job's id: one folder for all jobs of an array."""
    folder = Path("outputs") / name
    if job := os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID")):
        return folder / f"sweep-{job}"
    return unused_path(folder / f"sweep-{datetime.now():%Y-%m-%d_%H-%M-%S}")


def unused_path(path: Path) -> Path:
    """The path, or where something is there already the same with a number."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))
    return next(free for free in (path, *numbered) if not free.exists())


@cache
def _groups() -> dict[str, list[str]]:
    """The groups of the configuration and the choices in each, in the order of the defaults list."""
    listed = [next(iter(entry)) for entry in OmegaConf.load(CONF / "config.yaml").defaults if entry != "_self_"]
    return {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in listed}


def _errors(overrides: Iterable[str]) -> list[str]:
    """What is wrong with each override by itself: first the choices of groups, then the keys under good choices."""
    groups, errors, choices, values = _groups(), [], [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        if is_hydra_override(override):
            errors.append(
                f"{override}: Hydra's own keys have an effect in sweeps alone, python -m trainer -m\n"
                "  the run folder is run_dir="
            )
        elif message := _renamed_outside_groups(override):
            errors.append(message)
        elif not equals:
            errors.append(f"{override} is no override\n  write key=value")
        elif key not in groups:
            values.append(override)
        elif unknown := [choice for choice in _choices_in(key, value) if choice not in groups[key]]:
            errors.append(f"{override}: there is no such choice{suggest(unknown[0], groups[key])}")
        else:
            choices.append(override)
    return errors + _value_errors(choices, values)


def _choices_in(group: str, value: str) -> list[str]:
    """The choices that are made of a group: one, or as many as are listed."""
    if group not in LIST_GROUPS or not (value.startswith("[") and value.endswith("]")):
        return [value]
    return [choice.strip() for choice in value[1:-1].split(",") if choice.strip()]


def is_hydra_override(override: str) -> bool:
    """Whether the override is for Hydra itself."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _value_errors(choices: list[str], values: list[str]) -> list[str]:
    known = flatten(_plain(_without_hydra(_compose(choices))))
    errors, good = [], list(choices)
    for override in values:
        try:
            _compose([*choices, override])
            good.append(override)
        except COMPOSITION_ERRORS as error:
            key, _, value = override.partition("=")
            reason = f"{override} cannot be read: {str(error).splitlines()[0]}"
            way_out = f"  if it is a text, quote it: \"{key}='{value}'\""
            errors.append(f"{reason}\n{way_out}" if key in known else _unknown_key(override, list(known)))
    try:
        read_config(_plain(_without_hydra(_compose(good))))
    except ValueError as error:
        errors.append(str(error))
    return errors


def _plain(config: DictConfig) -> Tree:
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def _renamed_outside_groups(override: str) -> str | None:
    """The error for an old key; None below a group, where it may be an argument of the user's own target."""
    section = override.lstrip("+~").partition("=")[0].partition(".")[0]
    return None if section in _groups() else renamed(override)


def _unknown_key(override: str, known: list[str]) -> str:
    if message := renamed(override):
        return message
    key = override.partition("=")[0]
    section = _section(key)
    if not any(_section(name) == section for name in known):
        section = next((_section(name) for name in difflib.get_close_matches(key, known, n=1)), "")
    siblings = [name for name in known if _section(name) == section]
    siblings += [] if section else list(_groups())
    said = f"{key} is no key{suggest(key, siblings)}"
    return f"{said}\n  to hand a _target_ one more argument: +{key}=..." if _section(key) in _groups() else said


def _section(key: str) -> str:
    return key.rpartition(".")[0]
