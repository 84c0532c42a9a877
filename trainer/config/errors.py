"""Errors of overrides, each by itself: of the choices of groups, of unknown keys and flags, of values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from trainer.config.advice import Advice, advise, closest_choice, find_choice
from trainer.config.groups import chosen, find_groups, sections
from trainer.config.overrides import Typed, is_flag, is_hydra_override, read_typed
from trainer.config.renamed_keys import renamed
from trainer.utils.text import suggest
from trainer.utils.trees import flatten

Compose = Callable[[list[str]], dict[str, Any]]


def is_refused(override: str) -> bool:
    """Return whether an override is refused before it is composed: a flag, no key, a renamed one, one of Hydra's."""
    first = re.match(r"\w+", override)
    is_unknown = is_flag(override) or (first is not None and first[0] not in sections())
    return is_unknown or is_hydra_override(override) or _renamed_outside_groups(override) is not None


def override_errors(overrides: Iterable[str], compose: Compose) -> list[str]:
    """List the errors of overrides: first of the choices of groups, then of keys below valid choices.

    Args:
        overrides: of the configuration, and flags with their values.
        compose: returns the configuration of overrides as plain values; raises ValueError.
    """
    groups, errors, choices, others = find_groups(), [], [], []
    for typed in read_typed(overrides):
        if is_hydra_override(typed.text):
            errors.append(
                f"{typed.text}: Hydra's own keys have an effect only in sweeps, python -m trainer -m\n"
                "  the run folder is run_dir="
            )
        elif message := _renamed_outside_groups(typed.text):
            errors.append(message)
        elif not typed.is_flag and "=" not in typed.text and not typed.text.startswith("~"):
            errors.append(f"{typed.text} is no override{_question(find_choice(typed.text))}\n  valid: key=value")
        elif not typed.is_assignment or typed.name not in groups:
            others.append(typed)
        elif unknown := [choice for choice in chosen(typed.name, typed.value) if choice not in groups[typed.name]]:
            valid = groups[typed.name]
            meant = closest_choice(typed.name, unknown[0])
            errors.append(f"{typed.text}: there is no such choice{suggest(unknown[0], valid, meant)}")
        else:
            choices.append(typed.text)
    return errors + _key_errors(choices, others, compose)


def _key_errors(choices: list[str], others: Sequence[Typed], compose: Compose) -> list[str]:
    """List the errors of keys and values below valid choices."""
    tree = compose(choices)
    known = list(flatten(tree))
    unknown = [typed for typed in others if typed.is_flag or (typed.is_assignment and not _has(tree, typed.name))]
    given = [typed for typed in others if typed not in unknown]
    errors = [_unknown_key(typed, known, tree) for typed in unknown]
    try:
        tree = compose([*choices, *(typed.text for typed in given)]) if given else tree
    except ValueError:
        unreadable = {typed: message for typed in given if (message := _message(compose, [*choices, typed.text]))}
        errors += [_unreadable(typed, message, known, tree) for typed, message in unreadable.items()]
        tree = compose([*choices, *(typed.text for typed in given if typed not in unreadable)])
    return [*errors, *_value_errors(tree)] if choices or given else errors


def _value_errors(tree: dict[str, Any]) -> list[str]:
    from trainer.config.schema import read_config  # with pydantic, which a misspelt key alone does without

    try:
        read_config(tree)
    except ValueError as error:
        return [str(error)]
    return []


def _has(tree: Any, key: str) -> bool:
    """Return whether a tree of mappings has the dotted key, of a value or of a mapping."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _is_empty(tree: Any, key: str) -> bool:
    """Return whether a tree has an empty mapping here, to which users add what they like."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree == {}


def _message(compose: Compose, overrides: list[str]) -> str:
    """Return the error of composing the overrides; empty without one."""
    try:
        compose(overrides)
    except ValueError as error:
        return str(error)
    return ""


def _unreadable(typed: Typed, message: str, known: list[str], tree: dict[str, Any]) -> str:
    if typed.name not in known:
        return _unknown_key(typed, known, tree)
    way_out = f"  a text with special characters needs quotes: \"{typed.name}='{typed.value}'\""
    return f"{typed.text} cannot be read: {message.splitlines()[0]}\n{way_out}"


def _renamed_outside_groups(override: str) -> str | None:
    """Return the error for a renamed key; None below a group, where it may be an argument of a user's target."""
    section = override.lstrip("+~").partition("=")[0].partition(".")[0]
    return None if section in find_groups() else renamed(override)


def _unknown_key(typed: Typed, known: list[str], tree: dict[str, Any]) -> str:
    """Return the error of an unknown key or flag, with the one that was probably meant."""
    if message := renamed(f"{typed.name}={typed.value}"):
        return message
    if not typed.is_flag and _is_empty(tree, _section(typed.name)):
        return f"{typed.name} is no key\n  to add it to {_section(typed.name)}: +{typed.name}={typed.value or '...'}"
    advice = advise(typed.name, typed.value or "...", known)
    meant = advice and _shown(advice, typed)
    question, _, valid = suggest(typed.name, _siblings(typed.name, advice, known), meant).partition("\n")
    if typed.is_flag:
        question, valid = _question(meant), "  valid: key=value"
    lines = [f"{typed.text} is no override{question}" if typed.is_flag else f"{typed.name} is no key{question}"]
    lines += [f"  {advice.note}"] if advice and advice.note else []
    lines += [] if advice and (advice.is_translation or typed.is_flag) else [valid]
    is_argument = not typed.is_flag and _section(typed.name) in find_groups()
    lines += [f"  to add an argument of the _target_: +{typed.name}=..."] if is_argument else []
    return "\n".join(lines)


def _shown(advice: Advice, typed: Typed) -> str:
    """Return the key alone where nothing else of what was typed has to change."""
    return advice.key if typed.is_assignment and advice.overrides == f"{advice.key}={typed.value}" else advice.overrides


def _siblings(name: str, advice: Advice | None, known: Sequence[str]) -> list[str]:
    """Return the keys of the section of an unknown key, or of the section that was meant."""
    section = _section(name)
    if section not in map(_section, known):
        section = _section(advice.key) if advice else ""
    return [key for key in known if _section(key) == section] + ([] if section else list(find_groups()))


def _question(meant: str | None) -> str:
    return f"; did you mean {meant}?" if meant else ""


def _section(key: str) -> str:
    return key.rpartition(".")[0]
