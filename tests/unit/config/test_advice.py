"""Advice on unknown keys: the words of other tools, keys of choices that were not made, and spellings."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.cli.refusals import assert_says, composing
from tests.unit.config.flags_of_others import FLAGS
from trainer.config.advice import advise
from trainer.config.compose import compose_tree
from trainer.config.errors import override_errors
from trainer.config.foreign_keys import VALUES, WORDS
from trainer.config.groups import find_groups, keys_in_file
from trainer.utils.trees import flatten

TREE = compose_tree(["run_dir=run"])
KEYS = list(flatten(TREE))


def proposed(flag: str) -> str:
    """Return the override that the error of a flag proposes first, with the value that was typed if it shows none."""
    arguments = shlex.split(flag)
    (error,) = override_errors(arguments, lambda _: TREE)
    meant = re.search(r"; did you mean (.+)\?$", error, re.MULTILINE)
    if meant is None:
        return "nothing"
    value = arguments[1] if len(arguments) > 1 else flag.partition("=")[2]
    return meant[1] if "=" in meant[1] else f"{meant[1]}={value}"


def is_right(override: str, wanted: str) -> bool:
    """Return whether an override is the wanted one, of which `...` may have any value."""
    return override == wanted or (wanted.endswith("=...") and override.rpartition("=")[0] == wanted[: -len("=...")])


def test_flags_of_other_tools_are_answered_by_what_does_the_same_here() -> None:
    answers = {flag: (proposed(flag), wanted) for flags in FLAGS.values() for flag, wanted in flags.items()}
    wrong = {flag: answer for flag, answer in answers.items() if not is_right(*answer)}
    assert len(answers) == 50 and not wrong


def test_the_words_of_others_lead_to_keys_and_choices_that_there_are() -> None:
    groups = find_groups()
    keys = {*KEYS, *(key for group in groups for choice in groups[group] for key in keys_in_file(group, choice))}
    for word, text in WORDS.items():
        for override in text.partition("  # ")[0].split():
            key, _, value = override.partition("=")
            is_choice = key in groups and (value == "{}" or value.strip("[]") in groups[key])
            assert is_choice or key in keys or word in ("config_file", "debug", "verbose"), word
    assert not [key for key in VALUES if key not in keys and key not in groups]
    assert not [word for word in WORDS if word in KEYS or word in groups or not re.fullmatch("[a-z0-9_]+", word)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partition.alpha=0.1", ["mean partition=dirichlet partition.alpha=0.1?", "partition=dirichlet or quantity"]),
        ("algorithm.rule.byzantine=2", ["did you mean algorithm=krum algorithm.rule.byzantine=2?"]),
        ("transforms.crop.padding=2", ["did you mean transforms=[crop] transforms.crop.padding=2?"]),
        ("schedule.factor=0.5", ["did you mean schedule=step schedule.factor=0.5?"]),
        ("padding=2", ["did you mean transforms=[crop] transforms.crop.padding=2?"]),
    ],
)
def test_a_key_of_a_choice_that_was_not_made_names_the_choice(override: str, message: list[str]) -> None:
    assert_says(override_errors([override], lambda _: TREE)[0], message)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("gpus=2", "did you mean launch.nproc_per_node?"),
        ("nodes=2", "did you mean launch.nodes?"),
        ("epochs=3", "did you mean rounds?"),
        ("server.learning_rate=1", "did you mean server.lr?"),
        ("model.learning_rate=1", "did you mean optimizer.lr?"),
        ("data.batch_size=8", "did you mean batch_size?"),
        ("--batch-size=8", "did you mean batch_size=8?"),
        ("--rounds 8", "did you mean rounds=8?"),
        ("AdamW", "AdamW is no override; did you mean optimizer=adamw?"),
        ("algorithm=FedAvg", "did you mean fedavg?"),
        ("precision=16-mixed", "did you mean fp16?"),
        ("schedule=CosineAnnealingLR", "did you mean cosine?"),
        ("--nothing-like-it", "--nothing-like-it is no override\n  valid: key=value"),
    ],
)
def test_spellings_and_last_parts(typed: str, message: str) -> None:
    assert_says(override_errors(typed.split(), lambda _: TREE)[0], [message])


def test_a_choice_that_was_made_is_not_proposed_again() -> None:
    advice = advise("alpha", "0.1", [*KEYS, "partition.alpha"])
    assert advice and advice.overrides == "partition.alpha=0.1"


def test_flags_and_overrides_are_reported_together() -> None:
    message = composing(["--lr", "0.1", "rouds=3", "optimizer=AdamW", "--trainer.devices=-1", "batch_size=some"])
    assert_says(
        message, ["--lr 0.1 is no override; did you mean optimizer.lr=0.1?", "did you mean rounds?", "batch_size=some"]
    )
    assert_says(message, ["did you mean adamw?", "did you mean launch.nproc_per_node=auto?"])


def test_a_key_of_an_empty_mapping_is_added_to_it() -> None:
    assert_says(
        composing(["model=transformers", "model.config.vocab_size=500"]),
        ["model.config.vocab_size is no key", "to add it to model.config: +model.config.vocab_size=500"],
    )
