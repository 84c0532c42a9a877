"""Advice on unknown keys and choices: the override that was meant, by its spelling, or by a word of another tool."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config.foreign_keys import VALUES, WORDS
from trainer.config.groups import choose, find_groups, keys_in_file

MISSPELT = 0.85  # the least similarity by which a key of a misspelt section is known


@dataclass(frozen=True)
class Advice:
    """Overrides that were meant.

    Attributes:
        overrides: one, or after a choice that has the key.
        note: a line for the user, if the value counts another thing.
        is_translation: whether they were found by a word of another tool.
    """

    overrides: str
    note: str = ""
    is_translation: bool = False

    @property
    def key(self) -> str:
        """The key that does it."""
        return self.overrides.rpartition(" ")[2].partition("=")[0]


def advise(name: str, value: str, known: Sequence[str]) -> Advice | None:
    """Return what was meant by an unknown key; None without an idea.

    Args:
        name: as it was typed.
        value: `...` where none was typed.
        known: the keys of the configuration as far as it is valid.
    """
    name = name.lower().replace("-", "_")
    rules: tuple[Callable[[str, str, Sequence[str]], Advice | None], ...] = (
        _key_or_group,
        _key_of_a_choice,
        _key_of_a_misspelt_section,
        _word_in_its_section,
        _misspelt_key_of_a_section,
        _key_by_its_last_part,
        _word,
        _key_of_a_choice_by_its_last_part,
        _misspelt_key,
    )
    return next(filter(None, (rule(name, value, known) for rule in rules)), None)


def closest_choice(group: str, value: str) -> str | None:
    """Return the choice of a group that is meant by a name in another spelling: AdamW, adamw_torch, bf16-mixed."""
    choices = {_letters(choice): choice for choice in find_groups()[group]}
    letters = _letters(_translated(group, value))
    starts = sorted(filter(letters.startswith, choices), key=len)
    close = starts[-1:] or difflib.get_close_matches(letters, choices, n=1)
    return choices[close[0]] if close else None


def find_choice(name: str) -> str | None:
    """Return the override for the name of a choice that stands alone, such as AdamW; None if there is none."""
    for group, choices in find_groups().items():
        for choice in choices:
            if _letters(choice) == _letters(name):
                return choose(group, choice)
    return None


def _key_or_group(name: str, value: str, known: Sequence[str]) -> Advice | None:
    return Advice(_assign(name, value)) if name in known or name in find_groups() else None


def _key_of_a_choice(name: str, value: str, known: Sequence[str]) -> Advice | None:
    """Return the key with a choice of its group that has it."""
    group = name.partition(".")[0]
    having = [choice for choice in find_groups().get(group, ()) if name in keys_in_file(group, choice)]
    if not having:
        return None
    return Advice(f"{choose(group, having[0])} {name}={value}", f"a key of {group}={' or '.join(having)}")


def _key_of_a_misspelt_section(name: str, value: str, known: Sequence[str]) -> Advice | None:
    if _section(name) in map(_section, known):
        return None
    close = difflib.get_close_matches(name, [key for key in known if "." in key], n=1, cutoff=MISSPELT)
    return Advice(_assign(close[0], value)) if close else None


def _word_in_its_section(name: str, value: str, known: Sequence[str]) -> Advice | None:
    """Return the translation of a word; below a section of ours only one that lies there too."""
    advice, section = _word(name, value, known), _section(name)
    is_ours = section in find_groups() or section in map(_section, known)
    if advice is None or not is_ours or section in ("", _section(advice.key)):
        return advice
    same = f"{section}.{_last_part(advice.key)}"
    return Advice(_assign(same, value), is_translation=True) if same in known else None


def _word(name: str, value: str, known: Sequence[str]) -> Advice | None:
    """Return the translation of a word of another tool, without choices that are not needed."""
    if _last_part(name) not in WORDS:
        return None
    template, _, note = WORDS[_last_part(name)].partition("  # ")
    if template.startswith("--"):
        return Advice(template.replace("{}", value), note, is_translation=True)
    parts = [part.partition("=") for part in template.split()]
    if parts[-1][0] in known:
        parts = [part for part in parts if part[0] not in find_groups() or part is parts[-1]]
    overrides = " ".join(_assign(key, typed.replace("{}", value)) for key, _, typed in parts)
    return Advice(overrides, note, is_translation=True)


def _misspelt_key_of_a_section(name: str, value: str, known: Sequence[str]) -> Advice | None:
    siblings = [key for key in known if _section(key) == _section(name) != ""]
    close = difflib.get_close_matches(_last_part(name), map(_last_part, siblings), n=1)
    return Advice(_assign(f"{_section(name)}.{close[0]}", value)) if close else None


def _key_by_its_last_part(name: str, value: str, known: Sequence[str]) -> Advice | None:
    last = _last_part(name)
    found = [key for key in (*find_groups(), *known) if _last_part(key) == last]
    return Advice(_assign(found[0], value), _others(found[1:])) if found else None


def _key_of_a_choice_by_its_last_part(name: str, value: str, known: Sequence[str]) -> Advice | None:
    for group, choices in find_groups().items():
        for key in (key for choice in choices for key in keys_in_file(group, choice)):
            if _last_part(key) == _last_part(name) and group != "experiment":
                return _key_of_a_choice(key, value, known)
    return None


def _misspelt_key(name: str, value: str, known: Sequence[str]) -> Advice | None:
    if _section(name) and _section(name) in map(_section, known):  # its keys are unlike it
        return None
    candidates = [key for key in (*known, *find_groups()) if ("." in key) == ("." in name)]
    close = difflib.get_close_matches(name, candidates, n=1)
    return Advice(_assign(close[0], value)) if close else None


def _others(keys: Sequence[str]) -> str:
    return f"or {', '.join(keys)}" if keys else ""


def _assign(key: str, value: str) -> str:
    """Return the override of a key or a group, with a value that other tools write otherwise."""
    if key not in find_groups():
        return f"{key}={_translated(key, value)}"
    choice = closest_choice(key, value.strip("[]"))
    return choose(key, choice) if choice else f"{key}=..."


def _translated(key: str, value: str) -> str:
    for pattern, same in VALUES.get(key, {}).items():
        if match := re.fullmatch(pattern, value):
            return match.expand(same)
    return value


def _letters(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub(r"[\W_]", "", name.lower())


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]
