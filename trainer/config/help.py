"""Pages of `--help`: the command line, and the choices and keys of a group."""

from __future__ import annotations

import re
import textwrap

from trainer.config.groups import CONF, file_text, find_groups
from trainer.utils.text import format_value, suggest
from trainer.utils.trees import flatten

SECTIONS = ("silo", "site")  # of config.yaml, with a page of their own

USAGE = """\
python -m trainer [OPTION ...] [key=value ...]                  start the workers of this machine, and train
torchrun --nproc-per-node 4 -m trainer [key=value ...]          the same with workers that torchrun starts
python -m trainer -m optimizer.lr=0.1,0.03 seed=1,2,3           a sweep: all combinations, here six runs
python -m trainer report FOLDER ...                             runs side by side: a table, a page with curves
python -m trainer doctor [key=value ...]                        problems that such a run would have
python -m trainer plan [key=value ...]                          its cost: time, bytes, memory
python -m trainer partition [key=value ...]                     the clients and their examples: a table, a picture
python -m trainer tokenize FILE ... tokenizer=PATH out=FILE     texts to a file of tokens, for data=tokens
python -m trainer evaluate RUN [key=value ...]                  exact figures of a finished run, on other data too
python -m trainer export RUN, predict MODEL FILE, serve MODEL   a model for servers; its predictions; a server
python -m trainer certify, coordinator                          a federation of sites, each with its data: --help site

  --help GROUP               the choices of a group, with the keys of its default one; --help GROUP=CHOICE: of another
  --cfg job                  print the whole configuration, and start nothing
  --config FILE              a YAML file of keys and choices; those of the command line come after it
  --config-dir DIR           a folder of yamls in groups, as conf/ is; hydra.searchpath=[file://DIR,pkg://NAME]: several
  -q, --quiet                print nothing but errors
  --log-level LEVEL          of the logs in the run folder: debug, info, warning or error
  --version                  print the version
  -sc install=bash           print the shell completion; to have it: eval "$(silotrain -sc install=bash)"
  run.smoke=true             any configuration, tried in a few seconds

Exit codes: 0 finished, 1 failed, 2 bad input, 75 preempted: the same command, or run_dir= alone, continues the run."""


def help_page(topic: str = "") -> str:
    """Return the help of the command line; of a group or a choice (`group=choice`), if it is the topic.

    Raises:
        ValueError: there is no such group or choice.
    """
    group, _, choice = topic.partition("=")
    if topic in SECTIONS:
        return _section_page(topic)
    if group in find_groups():
        return _group_page(group, choice)
    if topic and not choice:
        raise ValueError(f"--help {topic}: there is no such group{suggest(topic, [*find_groups(), *SECTIONS])}")
    groups = "\n".join(_wrapped(group, options) for group, options in find_groups().items())
    base = (CONF / "config.yaml").read_text().split("\n\n", maxsplit=1)[1]
    # Keys below a group are on its own page.
    base = re.sub(rf"^(?:{'|'.join([*find_groups(), *SECTIONS])}):\n(?:  .*\n)+", "", base, flags=re.MULTILINE)
    keys = textwrap.indent(re.sub(r"\n+", "\n", base).rstrip(), "  ")
    return f"{USAGE}\n\nGroups (files in conf/; the keys of each: --help GROUP):\n{groups}\n\nKeys:\n{keys}"


def _wrapped(group: str, options: list[str]) -> str:
    indent = " " * 25
    return textwrap.fill(", ".join(options), 120, initial_indent=f"  {group + '=':<23}", subsequent_indent=indent)


def _group_page(group: str, choice: str) -> str:
    """List the choices of a group with the titles of their files, and the keys of one of them with their comments."""
    from trainer.config.compose import compose_group  # with Hydra, which the main page does without

    choices = find_groups()[group]
    if choice and choice not in choices:
        raise ValueError(f"--help {group}={choice}: there is no such choice{suggest(choice, choices)}")
    shown, keys = compose_group(group, choice)
    lines = [f"{group}=CHOICE, of:"]
    for name in choices:
        title = next(filter(_is_title, file_text(group, name).splitlines()), "")
        lines.append(f"  {name:<18} {title[2:]}".rstrip())
    if shown:
        comments = dict(re.findall(r"^ *(\w+):.*? # (.*)$", _explanations(group, shown), re.MULTILINE))
        lines += ["", f"Keys of {group}={shown}:"]
        for name, value in flatten(keys, f"{group}.").items():
            line, comment = f"  {name}={format_value(value)}", comments.get(name.rpartition(".")[2])
            lines.append(f"{line:<50} # {comment}" if comment else line)
    return "\n".join(lines)


def _section_page(section: str) -> str:
    """List the keys of a section of config.yaml with their comments."""
    found = re.search(rf"^{section}:\n((?:  .*\n)+)", (CONF / "config.yaml").read_text(), re.MULTILINE)
    assert found
    keys = re.findall(r"^  (\w+): (.*?) # (.*)$", found[1], re.MULTILINE)
    return "\n".join(f"{f'{section}.{name}={value}':<29} # {comment}" for name, value, comment in keys)


def _explanations(group: str, choice: str) -> str:
    """Return the texts of the files that explain the keys of a choice, its own last."""
    text = file_text(group, choice)
    bases = re.findall(rf"^  - (\w+)(?:@{group})?$", text, re.MULTILINE)  # in its list of defaults
    base_texts = [_explanations(group, base) for base in bases] or [(CONF / "config.yaml").read_text()]
    return "\n".join([*base_texts, text])


def _is_title(line: str) -> bool:
    return line.startswith("# ") and not line.startswith("# @")
