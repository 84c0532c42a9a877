"""The settings by which runs differ, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.folders import composed_tree
from trainer.checkpoint.run_dir import CHANGEABLE_KEYS
from trainer.commands.report.settings import configuration_of, differing, setting_text, short_titles
from trainer.utils.trees import flatten


def composed(*overrides: str) -> dict[str, Any]:
    return flatten(composed_tree(overrides))


def test_seed_and_place_make_no_other_configuration() -> None:
    one = composed(
        "seed=1", "run_dir=a", "launch.nproc_per_node=1", "name=x", "checkpoint.keep_last=5", "metrics.per_client=none"
    )
    assert configuration_of(one) == configuration_of(composed())
    assert differing([one, composed()]) == []


def test_the_algorithm_comes_first_and_the_rest_in_the_order_of_the_configuration() -> None:
    runs = [composed(), composed("optimizer.lr=0.5", "batch_size=8", "algorithm=fedavg", "silos=2")]
    assert differing(runs) == ["algorithm._target_", "silos", "batch_size", "optimizer.lr"]


def test_what_only_one_class_has_goes_with_the_class() -> None:
    """`server` implies FedOpt's rule and betas, but not its rate, which SGD has too."""
    runs = [composed("algorithm=fedavg"), composed("algorithm=fedadam")]
    assert differing(runs) == ["server._target_", "server.lr"]


def test_what_differs_between_runs_of_one_class_is_named() -> None:
    runs = [composed(), composed("algorithm=fedavg"), composed("algorithm=fedprox", "algorithm.proximal_mu=0.5")]
    assert differing(runs) == ["algorithm._target_", "algorithm.proximal_mu"]
    assert setting_text("algorithm._target_", runs) == ["Sync", "FedAvg", "FedAvg"]
    assert setting_text("algorithm.proximal_mu", runs) == ["–", "0.0", "0.5"]


def test_an_argument_that_only_some_runs_of_a_class_were_given_is_named() -> None:
    runs = [composed(), composed("+optimizer.momentum=0.9")]
    assert differing(runs) == ["optimizer.momentum"]
    assert setting_text("optimizer.momentum", runs) == ["–", "0.9"]


def test_a_class_is_said_in_full_where_its_last_name_is_not_enough() -> None:
    runs = [{"model._target_": "mine.Net"}, {"model._target_": "yours.Net"}]
    assert setting_text("model._target_", runs) == ["mine.Net", "yours.Net"]


def test_the_same_number_is_the_same_setting() -> None:
    assert configuration_of({"optimizer.lr": 1}) == configuration_of({"optimizer.lr": 1.0})


def test_lists_and_mappings_are_compared_by_what_they_hold() -> None:
    runs = [{"silos": [1, 2], "a": [{"b": 1}]}, {"silos": [1, 2], "a": [{"b": 2}]}]
    assert differing(runs) == ["a"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["optimizer.lr", "silos", "model._target_"], ["lr", "silos", "model"]),
        (["optimizer.lr", "server.lr", "round.steps"], ["optimizer.lr", "server.lr", "steps"]),
    ],
)
def test_titles_are_as_short_as_they_may_be(names: list[str], short: list[str]) -> None:
    assert short_titles(names) == short


SETTINGS = st.dictionaries(
    st.sampled_from(["a", "b.c", "b._target_", "d.e", "seed", "launch.nproc_per_node"]), st.integers(0, 2)
)


@given(st.lists(SETTINGS, min_size=1, max_size=5))
def test_configurations_that_differ_can_be_told_by_the_differing_settings(runs: list[dict[str, int]]) -> None:
    """Two runs have equal values of them if and only if they are the same configuration."""
    names = differing(runs)
    columns = [setting_text(name, runs) for name in names]
    rows = list(zip(*columns, strict=True)) or [()] * len(runs)
    for one, row in zip(runs, rows, strict=True):
        for other, other_row in zip(runs, rows, strict=True):
            assert (row == other_row) == (configuration_of(one) == configuration_of(other))
    assert not [name for name in names if name.startswith((*CHANGEABLE_KEYS, "seed"))]
