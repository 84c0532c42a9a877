"""Compose overrides to one resolved tree of plain values. Hydra's types stop here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.errors import is_refused, override_errors
from trainer.config.groups import CONF, choose, search_path_overrides
from trainer.distributed.environment import was_requeued
from trainer.utils.text import format_value
from trainer.utils.trees import flatten

Tree = dict[str, Any]

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


def compose_tree(
    overrides: list[str], claim: Callable[[Path], Path] | None = None, check: Callable[[Tree], None] | None = None
) -> Tree:
    """Compose overrides to a resolved configuration, and validate it.

    Args:
        overrides: of the configuration.
        claim: returns the path to use instead of one that may exist, for the default run folder; None: an unused one.
        check: raises ValueError for a configuration that is not for this command, before the run folder is claimed.

    Raises:
        ValueError: lists every error in the overrides.
    """
    # Hydra takes no null for a group, though it is the default of this one.
    overrides = [override for override in overrides if override != "experiment=null"]
    try:
        if any(map(is_refused, overrides)):
            raise ValueError("not for Hydra")
        config = compose_config(overrides)
    except COMPOSITION_ERRORS as error:
        raise ValueError("\n".join(override_errors(overrides, _compose_plain) or [str(error)])) from error
    choices = config.hydra.runtime.choices
    config = _without_hydra(config)
    if (config.data.files or config.site.listen) and OmegaConf.is_missing(config.data, "path"):
        config.data.path = None  # of files of their own, and of a coordinator, which needs no data
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError("\n".join(f"{key} has no value\n  set {key}=..." for key in missing))
    tree = _plain(config)
    from trainer.config.schema import read_config  # with pydantic, which an unknown key does without
    from trainer.config.sites import complete_site

    read_config(tree)
    complete_site(tree)
    if check:
        check(tree)
    if tree["run"]["smoke"]:
        _make_smoke_run(tree)
    tree["name"] = tree["name"] or choices["experiment"] or f"{choices['data']}-{choices['algorithm']}"
    tree["run_dir"] = tree["run_dir"] or str(_new_run_dir(tree["name"], claim or unused_path))
    _check_home(tree)
    tree |= {key: os.path.expanduser(tree[key]) for key in ("run_dir", "resume")}
    if was_requeued() and tree["resume"] == "never":
        tree["resume"] = "auto"  # the folder was written by this very job
    return tree


@contextmanager
def compose_run(overrides: list[str], check: Callable[[Tree], None] | None = None) -> Iterator[Tree]:
    """Compose a run that begins in the block. Its default folder is made at once, so that no other run gets it.

    A folder that nothing was put into is removed with the end of the block.

    Args:
        overrides: of the configuration.
        check: as of `compose_tree`.

    Raises:
        ValueError: as of `compose_tree`; or the folder cannot be made.
    """
    made: list[Path] = []

    def claim(path: Path) -> Path:
        made.append(next(filter(_make_folder, _numbered(path))))
        return made[0]

    try:
        yield compose_tree(overrides, claim, check)
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _make_folder(path: Path) -> bool:
    """Make a folder that only its owner may look into; return whether there was none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise ValueError(f"{path} cannot be made: {error.strerror}\n  choose another folder with run_dir=") from error
    return True


def _check_home(tree: Tree) -> None:
    """Raise ValueError for values that begin with ~ where there is no such home directory."""
    homeless = [
        f"{key}={format_value(value)}"
        for key, value in flatten(tree).items()
        if any(
            os.path.expanduser(str(text)).startswith("~/") for text in (value if isinstance(value, list) else [value])
        )
    ]
    if homeless:
        listed = "\n".join(homeless)
        raise ValueError(f"{listed}\n  there is no home directory: set HOME, or absolute paths")


def _make_smoke_run(tree: Tree) -> None:
    """Make it two rounds of one step, evaluated at the end. Done here, so that config.yaml records it."""
    tree["rounds"] = 2
    tree["round"]["steps"] = 1
    tree["eval"]["every_rounds"] = 2
    tree["checkpoint"]["every_rounds"] = 1
    tree["stop"] = dict.fromkeys(tree["stop"])


def compose_config(overrides: list[str]) -> DictConfig:
    """Compose overrides, with Hydra's own configuration beside ours; raise one of COMPOSITION_ERRORS."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*search_path_overrides(), *overrides], return_hydra_config=True)


def compose_group(group: str, choice: str = "") -> tuple[str, Tree]:
    """Return the choice of a group, the default one for an empty `choice`, and its keys as they are written."""
    config = compose_config([choose(group, choice)] if choice else [])
    keys = OmegaConf.select(config, group)
    found = OmegaConf.to_container(keys) if isinstance(keys, DictConfig) else {}
    return choice or config.hydra.runtime.choices.get(group, ""), found  # pyright: ignore[reportReturnType]


def _compose_plain(overrides: list[str]) -> Tree:
    """Compose overrides to plain values; raise ValueError for whatever is refused."""
    try:
        return _plain(_without_hydra(compose_config(overrides)))
    except COMPOSITION_ERRORS as error:
        raise ValueError(str(error)) from error


def _without_hydra(config: DictConfig) -> DictConfig:
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return config


def complete(command: str) -> None:
    """Print Hydra's shell completion: `install=bash`, `uninstall=bash`, or `query=bash` for the line in COMP_LINE.

    Raises:
        ValueError: there is no such command, or no completion for this shell.
    """
    program, *words = os.environ.get("COMP_LINE", "").split(" ")
    # Hydra's parser knows neither our commands nor our options.
    words = [word for index, word in enumerate(words, 1) if "=" in word or index == len(words)]
    os.environ["COMP_LINE"] = " ".join([program, *words])
    sys.argv[0] = "silotrain"  # `python -m trainer` cannot be completed
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            GlobalHydra.instance().hydra.shell_completion("config", [command])  # pyright: ignore
    except ValueError as error:
        raise ValueError(f"-sc {command}\n  valid: install=bash, uninstall=bash; or zsh or fish for bash") from error


def _new_run_dir(name: str, claim: Callable[[Path], Path]) -> Path:
    """Return outputs/<name>/<time>, or under SLURM with the job's id, by which a requeued job finds its run."""
    folder = Path("outputs") / name
    if job := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return folder / f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job := os.environ.get("SLURM_JOB_ID"):
        return folder / job
    return claim(folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


def new_sweep_dir(name: str) -> Path:
    """Return outputs/<name>/sweep-<time>, or under SLURM with the job's id: one folder for all jobs of an array."""
    folder = Path("outputs") / name
    if job := os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID")):
        return folder / f"sweep-{job}"
    return unused_path(folder / f"sweep-{datetime.now():%Y-%m-%d_%H-%M-%S}")


def unused_path(path: Path) -> Path:
    """Return the path; with a number appended if it exists already."""
    return next(free for free in _numbered(path) if not free.exists())


def _numbered(path: Path) -> Iterator[Path]:
    """Yield the path, and then the same with a number appended."""
    yield path
    yield from (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))


def _plain(config: DictConfig) -> Tree:
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]
