"""Only what its list names and site.allow permits leaves a site; zeros leave in place of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws.cases import case_run
from tests.support.folders import composed_tree
from trainer.algorithms.round import Round
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.federation.disclosure import ALWAYS, ITEMS, Disclosure
from trainer.federation.messages import Message
from trainer.federation.options import FIGURES
from trainer.loop.exchange import RANKS
from trainer.loop.round_metrics import RoundAccumulator
from trainer.models.buffers import BufferStatistics
from trainer.utils.errors import InputError

ROOT = Path(__file__).parents[3]
TRAINING = Message(
    {
        "key": "rounds/3/training",
        "sums": {"loss_sum": 3.5, "units": 7.0, "weight": 7.0, "effective_steps": 2.0, "stopping": 1.0},
        "metrics": None,
    },
    {
        "table/silos": torch.tensor([[1.0, 2.0]]),
        "table/statistics": torch.tensor([0.5]),
        "vector/delta": torch.ones(4),
    },
)
EVALUATION = Message(
    {"key": "rounds/0/evaluation", "sums": {"stopping": 1.0}},
    {
        "table/test/clients": torch.tensor([[0.0, 0.0], [5.0, 2.5]], dtype=torch.float64),
        "table/test/by_client": torch.tensor([[0.0], [0.75]], dtype=torch.float64),
        "table/test/by_class": torch.tensor([[1.0, 2.0, 3.0]]),
        "table/validation/scores of by_score": torch.ones(1, 4, 4),
    },
)


def zeros(message):
    return {name for name, tensor in message.tensors.items() if not tensor.any()}


@pytest.mark.parametrize("message", [TRAINING, EVALUATION])
def test_everything_leaves_a_site_that_allows_all(message):
    reduced = Disclosure().reduce(message)
    assert reduced.header == message.header
    assert all(torch.equal(reduced.tensors[name], tensor) for name, tensor in message.tensors.items())


def test_the_figures_of_training_stay():
    reduced = Disclosure(["evaluation"]).reduce(TRAINING)
    assert reduced.header["sums"] == TRAINING.header["sums"] | {"loss_sum": 0.0, "units": 0.0}
    assert zeros(reduced) == {"table/silos"}
    assert TRAINING.tensors["table/silos"].any()  # the site's own are as they were


@pytest.mark.parametrize(
    ("allowed", "stays"),
    [
        (["evaluation", "labels"], set()),
        (["evaluation"], {"table/test/by_class", "table/validation/scores of by_score"}),
        (["labels"], set(EVALUATION.tensors)),
        ([], set(EVALUATION.tensors)),
    ],
)
def test_scores_and_labels_stay(allowed, stays):
    reduced = Disclosure(allowed).reduce(EVALUATION)
    assert zeros(reduced) == stays
    assert reduced.header["sums"] == {"stopping": 1.0}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("rounds/1/training", "table/labels"),
        ("rounds/1/evaluation", "vector/delta"),
        ("start/model", "vector/delta"),
        ("start/sizes", "sums"),
        ("end/artifacts", "table/inputs"),
    ],
)
def test_what_is_not_listed_does_not_leave(key, name):
    with pytest.raises(InputError, match=f"{name} of {key} is not in the list"):
        Disclosure().reduce(Message({"key": key}, {name: torch.ones(1)}))
    if not key.endswith("training"):
        with pytest.raises(InputError, match="nothing of it has left"):
            Disclosure().reduce(Message({"key": key, "sums": {"loss_sum": 1.0}}))


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("start/transforms-0", "statistics"),
        ("start/columns-numbers", "statistics"),
        ("start/weights-classes", "labels"),
    ],
)
def test_numbers_that_a_run_needs_are_refused_with_the_way_out(key, figure):
    message = Message({"key": key}, {"sums": torch.ones(3)})
    assert not zeros(Disclosure([figure]).reduce(message))
    others = [each for each in FIGURES if each != figure]
    allowed = ",".join(others)
    reason = rf"site\.allow=\[{allowed}\], and this run needs.*\n  add {figure} to site\.allow, or (give|train)"
    with pytest.raises(InputError, match=reason):
        Disclosure(others).reduce(message)


def test_others_get_the_sum_over_the_clients_alone():
    pooled = Disclosure(names_clients=False).reduce(EVALUATION).tensors
    assert torch.equal(pooled["table/test/clients"], torch.tensor([[5.0, 2.5], [0.0, 0.0]], dtype=torch.float64))
    assert torch.equal(pooled["table/test/by_class"], EVALUATION.tensors["table/test/by_class"])
    assert zeros(Disclosure(names_clients=False).reduce(TRAINING)) == {"table/silos"}


def test_the_numbers_of_a_round_are_those_of_the_list():
    """A new one is to be put where it belongs: figures of training, or what the combination needs."""
    with distributed(device="cpu") as topology:
        run = case_run(topology, "fedavg", {"rounds": 1})
        accumulator = RoundAccumulator(run, Round(0, 0, (0,)), BufferStatistics(run.make_model()))
        tables = accumulator.tables()
    needed = {"units_seen", "trained_weight", "steps", "examples_seen", "clients", "counted", "learning_rates"}
    of_training = {"loss_sum", "units", "on_time", "gradient_norms"}
    assert accumulator.scalars().keys() == needed | of_training | {"left_out", "late"}
    named = {f"table/{name}" for name in tables if not name.startswith(RANKS)}
    assert named <= {name for item in ITEMS for name in item.names}


@given(st.sets(st.sampled_from(FIGURES)))
def test_the_list_says_of_each_item_whether_it_leaves(allowed):
    disclosure = Disclosure(allowed)
    lines = disclosure.lines()
    assert len(lines) == len(ALWAYS) + len(ITEMS)
    for item in ITEMS:
        (line,) = (line for line in lines if line.endswith(item.text))
        assert line.startswith("  stays") == (not item.needs <= allowed)
    assert set(disclosure.withheld) == set(FIGURES) - allowed
    states = np.array([line.startswith("  stays") for line in lines])
    assert (states[:-1] <= states[1:]).all()


def test_the_documentation_has_the_list():
    text = (ROOT / "docs" / "sites.md").read_text()
    assert "\n".join(Disclosure(["training"]).lines()) in text


@pytest.mark.parametrize("names", [["training", "sizes"], ["labels", "labels"], "all"])
def test_names_that_are_none_are_refused(names):
    tree = composed_tree(())
    with pytest.raises(ValueError, match=r"site\.allow=.*\n  valid: a list of some of training, evaluation, labels"):
        read_config({**tree, "site": {**tree["site"], "allow": names}})
