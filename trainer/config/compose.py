"""Compose overrides to one resolved tree of plain values, and report all errors in them. Hydra's types stop here."""

from __future__ import annotations

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.renamed_keys import renamed
from trainer.config.schema import read_config
from trainer.distributed.environment import was_requeued
from trainer.utils.text import format_value, suggest
from trainer.utils.trees import flatten

Tree = dict[str, Any]

PACKAGE = Path(__file__).parents[1]
# In a source tree conf/ lies beside the package, in an installed one inside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.exists())

# Folders of the user's own yamls beside conf/, as the items of a list in Hydra's grammar; workers inherit it.
SEARCH_PATH = "SILOTRAIN_SEARCH_PATH"

LIST_GROUPS = ("client_shift", "transforms", "loggers")  # groups of any number of choices

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)

USAGE = """\
python -m trainer [OPTION ...] [key=value ...]                  start the workers of this machine, and train
torchrun --nproc-per-node 4 -m trainer [key=value ...]          the same with workers that torchrun starts
python -m trainer -m optimizer.lr=0.1,0.03 seed=1,2,3           a sweep: all combinations, here six runs
python -m trainer report FOLDER ...                             runs side by side: a table, a page with curves
python -m trainer doctor [key=value ...]                        problems that such a run would have
python -m trainer plan [key=value ...]                          its cost: time, bytes, memory
python -m trainer partition [key=value ...]                     the clients and their examples: a table, a picture
python -m trainer tokenize FILE ... tokenizer=PATH out=FILE     texts to a file of tokens, for data=tokens

  --help GROUP               the choices of a group, with the keys of its default one; --help GROUP=CHOICE: of another
  --cfg job                  print the whole configuration, and start nothing
  --config FILE              a YAML file of keys and choices; those of the command line come after it
  --config-dir DIR           a folder of yamls in groups, as conf/ is; hydra.searchpath=[file://DIR,pkg://NAME]: several
  -q, --quiet                print nothing but errors
  --log-level LEVEL          of the logs in the run folder: debug, info, warning or error
  --version                  print the version
  -sc install=bash           print the shell completion; to have it: eval "$(silotrain -sc install=bash)"

  python -m trainer algorithm=fedavg silos=2 partition=dirichlet partition.alpha=0.1
  python -m trainer run.smoke=true ...                          tries any configuration in a few seconds

Exit codes: 0 finished, 1 failed, 2 bad input, 75 preempted: the same command continues the run."""


def compose_tree(overrides: list[str], choose: Callable[[Path], Path] | None = None) -> Tree:
    """Compose overrides to a resolved configuration, and validate it.

    Args:
        overrides: of the configuration.
        choose: returns the path to use instead of one that may exist, for the default run folder; None: an unused one.

    Raises:
        ValueError: lists every error in the overrides.
    """
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
    tree["run_dir"] = tree["run_dir"] or str(_new_run_dir(tree["name"], choose or unused_path))
    _check_home(tree)
    tree |= {key: os.path.expanduser(tree[key]) for key in ("run_dir", "resume")}
    if was_requeued() and tree["resume"] == "never":
        tree["resume"] = "auto"  # the folder was written by this very job
    return tree


@contextmanager
def compose_run(overrides: list[str]) -> Iterator[Tree]:
    """Compose a run that begins in the block. Its default folder is made at once, so that no other run gets it.

    A folder that nothing was put into is removed with the end of the block.

    Raises:
        ValueError: as of `compose_tree`; or the folder cannot be made.
    """
    made: list[Path] = []

    def claim(path: Path) -> Path:
        made.append(next(filter(_make_folder, _numbered(path))))
        return made[0]

    try:
        yield compose_tree(overrides, claim)
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


def _compose(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*search_path_overrides(), *overrides], return_hydra_config=True)


def search_path_overrides() -> list[str]:
    """Return the override that adds the user's own folders of yamls, if there are any."""
    return [f"hydra.searchpath=[{os.environ[SEARCH_PATH]}]"] if SEARCH_PATH in os.environ else []


def _without_hydra(config: DictConfig) -> DictConfig:
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return config


def help_page(topic: str = "") -> str:
    """Return the help of the command line; of a group or a choice (`group=choice`), if it is the topic.

    Raises:
        ValueError: there is no such group or choice.
    """
    group, _, choice = topic.partition("=")
    if group in _groups():
        return _group_page(group, choice)
    if topic and not choice:
        raise ValueError(f"--help {topic}: there is no such group{suggest(topic, list(_groups()))}")
    groups = "\n".join(_wrapped(group, options) for group, options in _groups().items())
    base = (CONF / "config.yaml").read_text().split("\n\n", maxsplit=1)[1]
    # Keys below a group are on its own page.
    base = re.sub(rf"^(?:{'|'.join(_groups())}):\n(?:  .*\n)+", "", base, flags=re.MULTILINE)
    keys = textwrap.indent(base.replace("\n\n", "\n").rstrip(), "  ")
    return f"{USAGE}\n\nGroups (files in conf/; the keys of each: --help GROUP):\n{groups}\n\nKeys:\n{keys}"


def _wrapped(group: str, options: list[str]) -> str:
    indent = " " * 25
    return textwrap.fill(", ".join(options), 120, initial_indent=f"  {group + '=':<23}", subsequent_indent=indent)


def _group_page(group: str, choice: str) -> str:
    """List the choices of a group with the titles of their files, and the keys of one of them with their comments."""
    choices = _groups()[group]
    if choice and choice not in choices:
        raise ValueError(f"--help {group}={choice}: there is no such choice{suggest(choice, choices)}")
    composed = _compose([f"{group}={f'[{choice}]' if group in LIST_GROUPS else choice}"] if choice else [])
    shown = choice or composed.hydra.runtime.choices.get(group, "")
    lines = [f"{group}=CHOICE, of:"]
    for name in choices:
        title = next(filter(_is_title, _file_text(group, name).splitlines()), "")
        lines.append(f"  {name:<18} {title[2:]}".rstrip())
    keys = OmegaConf.select(composed, group)
    if shown and isinstance(keys, DictConfig):
        comments = dict(re.findall(r"^ *(\w+):.*? # (.*)$", _explanations(group, shown), re.MULTILINE))
        lines += ["", f"Keys of {group}={shown}:"]
        for name, value in flatten(OmegaConf.to_container(keys), f"{group}.").items():  # pyright: ignore
            line, comment = f"  {name}={format_value(value)}", comments.get(name.rpartition(".")[2])
            lines.append(f"{line:<50} # {comment}" if comment else line)
    return "\n".join(lines)


def _explanations(group: str, choice: str) -> str:
    """Return the texts of the files that explain the keys of a choice, its own last."""
    text = _file_text(group, choice)
    bases = re.findall(rf"^  - (\w+)(?:@{group})?$", text, re.MULTILINE)  # in its list of defaults
    base_texts = [_explanations(group, base) for base in bases] or [(CONF / "config.yaml").read_text()]
    return "\n".join([*base_texts, text])


def _is_title(line: str) -> bool:
    return line.startswith("# ") and not line.startswith("# @")


def _file_text(group: str, choice: str) -> str:
    """Return the text of a choice's file; empty for one that lies elsewhere than in conf/."""
    path = CONF / group / f"{choice}.yaml"
    return path.read_text() if path.exists() else ""


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


def file_overrides(path: Path) -> list[str]:
    """Return the overrides that set the keys of a YAML file: `key: value`, `section: {key: value}`, `group: choice`.

    A group that is a mapping with a `_target_`, as in the config.yaml of a run folder, is a custom choice.

    Raises:
        ValueError: the file cannot be read, or holds no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} is no mapping\n  valid: a YAML file of keys and values, such as rounds: 10")
    overrides = []
    for key, value in tree.items():
        if not isinstance(value, dict):
            overrides.append(f"{key}={format_value(value) if key in _groups() else literal(value)}")
        elif "_target_" in value and "custom" in _groups().get(key, ()):
            overrides += [f"{key}=custom", *(f"++{key}.{name}={literal(item)}" for name, item in value.items())]
        elif key in LIST_GROUPS:
            overrides += [f"++{key}.{name}={literal(item)}" for name, item in value.items()]
        else:
            overrides += [f"{name}={literal(item)}" for name, item in flatten(value, f"{key}.").items()]
    return overrides


def literal(value: Any) -> str:
    """Write a plain value in the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if not isinstance(value, str):
        return format_value(value)
    # Backslashes count only before a quote, and the last ones stand before the closing one.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', value))
    return f'"{escaped}"'


def _new_run_dir(name: str, choose: Callable[[Path], Path]) -> Path:
    """Return outputs/<name>/<time>, or under SLURM with the job's id, by which a requeued job finds its run."""
    folder = Path("outputs") / name
    if job := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return folder / f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job := os.environ.get("SLURM_JOB_ID"):
        return folder / job
    return choose(folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


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


def _groups() -> dict[str, list[str]]:
    """Return the choices of each group, in the order of the defaults list."""
    return _find_groups(*search_path_overrides())


@cache
def _find_groups(*search_path: str) -> dict[str, list[str]]:
    listed = [next(iter(entry)) for entry in OmegaConf.load(CONF / "config.yaml").defaults if entry != "_self_"]
    groups = {group: {path.stem for path in (CONF / group).glob("*.yaml")} for group in listed}
    if search_path:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            for group, choices in groups.items():
                choices |= {*loader.get_group_options(group, ObjectType.CONFIG, "config", list(search_path))}
    return {group: sorted(choices) for group, choices in groups.items()}


def _errors(overrides: Iterable[str]) -> list[str]:
    """List the errors of each override by itself: first of the choices of groups, then of keys below valid choices."""
    groups, errors, choices, values = _groups(), [], [], []
    for override in overrides:
        key, equals, value = override.partition("=")
        if is_hydra_override(override):
            errors.append(
                f"{override}: Hydra's own keys have an effect only in sweeps, python -m trainer -m\n"
                "  the run folder is run_dir="
            )
        elif message := _renamed_outside_groups(override):
            errors.append(message)
        elif not equals:
            errors.append(f"{override} is no override\n  valid: key=value")
        elif key not in groups:
            values.append(override)
        elif unknown := [choice for choice in _choices_in(key, value) if choice not in groups[key]]:
            errors.append(f"{override}: there is no such choice{suggest(unknown[0], groups[key])}")
        else:
            choices.append(override)
    return errors + _value_errors(choices, values)


def _choices_in(group: str, value: str) -> list[str]:
    """Return the choices in the value of a group: one, or those of a list."""
    if group not in LIST_GROUPS or not (value.startswith("[") and value.endswith("]")):
        return [value]
    return [choice.strip() for choice in value[1:-1].split(",") if choice.strip()]


def is_hydra_override(override: str) -> bool:
    """Return whether the override is for Hydra itself."""
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
            way_out = f"  a text with special characters needs quotes: \"{key}='{value}'\""
            errors.append(f"{reason}\n{way_out}" if key in known else _unknown_key(override, list(known)))
    try:
        read_config(_plain(_without_hydra(_compose(good))))
    except ValueError as error:
        errors.append(str(error))
    return errors


def _plain(config: DictConfig) -> Tree:
    return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def _renamed_outside_groups(override: str) -> str | None:
    """Return the error for a renamed key; None below a group, where it may be an argument of a user's target."""
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
    error = f"{key} is no key{suggest(key, siblings)}"
    return f"{error}\n  to add an argument of the _target_: +{key}=..." if _section(key) in _groups() else error


def _section(key: str) -> str:
    return key.rpartition(".")[0]
