"""An override of a renamed key is refused with the new override."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.refusals import assert_says, building, composing
from trainer.checkpoint.run_dir import RunDir
from trainer.config.compose import compose_tree
from trainer.config.groups import CONF
from trainer.config.renamed_keys import RENAMED
from trainer.distributed.topology import distributed
from trainer.utils.trees import flatten

# Choices that have all the keys.
CHOICES = ["algorithm=fedavg", "silos=2", "schedule=cosine", "client_sampling=sample"]
SAMPLED = [*CHOICES, "client_sampling.clients_per_round=2"]
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}
# An added key of a group may be an argument of the user's class, so it is checked when the object is made.
BELOW_GROUPS = [old for old in RENAMED if old.partition(".")[0] in GROUPS]


def error(old: str, new: str, value: str = "1") -> str:
    return f"{old} is no key: it is called {new}\n  set {new}={value}"


def test_the_new_names_are_keys_and_the_old_ones_are_not() -> None:
    keys = flatten(compose_tree([*SAMPLED, "run_dir=run"]))
    for choice in ("algorithm=krum", "algorithm=trimmed_mean", "task=multi_label"):
        keys |= flatten(compose_tree([choice]))
    present = {*keys, *GROUPS, *(key.partition(".")[0] for key in keys)}
    assert set(RENAMED.values()) <= present and not RENAMED.keys() & present


def test_an_old_key_is_answered_by_the_new_one() -> None:
    assert_says(composing([*CHOICES, *(f"{old}=1" for old in RENAMED)]), [error(*pair) for pair in RENAMED.items()])


def test_an_old_key_that_is_added_is_answered_by_the_new_one() -> None:
    others = [old for old in RENAMED if old not in BELOW_GROUPS]
    assert_says(composing([f"+{old}=1" for old in others]), [error(old, RENAMED[old]) for old in others])
    with distributed(device="cpu") as topology:
        message = building([*SAMPLED, *(f"+{old}=1" for old in BELOW_GROUPS)], topology)
    assert_says(message, [error(old, RENAMED[old]) for old in BELOW_GROUPS])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("uplink=int8", error("uplink", "update_compression", "int8")),
        ("uplink.block=64", error("uplink.block", "update_compression.block", "64")),
        ("preprocess=[crop,flip]", error("preprocess", "transforms", "[crop,flip]")),
        (
            "+sinks.mine={_target_: my.Own}",
            "sinks.mine is no key: it is called loggers.mine\n  set +loggers.mine={_tar",
        ),
        ("report.per_client=none", error("report.per_client", "metrics.per_client", "none")),
        ("round.late=count", error("round.late", "round.stragglers", "keep")),
        ("run_dir_shared=auto", error("run_dir_shared", "require_shared_run_dir", "false")),
    ],
)
def test_the_override_to_set_has_its_value(override: str, message: str) -> None:
    assert_says(composing([override]), [message])


def test_the_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    tree = compose_tree([f"run_dir={tmp_path}"])
    folder = RunDir(tmp_path)
    folder.create_or_check(tree)
    stored = {**tree, "uplink": tree["update_compression"]}
    del stored["update_compression"]
    folder.config.write_text(yaml.safe_dump(stored))
    with pytest.raises(ValueError, match="was written by an older version") as refusal:
        folder.check(tree)
    assert_says(str(refusal.value), [f"{tmp_path} was", "uplink", "another run_dir"])
