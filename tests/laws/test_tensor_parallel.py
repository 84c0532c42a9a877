"""A silo whose ranks divide the layers of its model trains as a silo of one rank does, with every algorithm.

In float64. Sums are added in another order, so weights and figures agree to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import CASES, CLASSES, FEATURES, Records, assert_close, case_run, figures, silos_of
from tests.laws.test_midround import Orders, contact_of
from tests.laws.test_reshard import LEAVING, LONG, whole_model
from tests.laws.test_resume import ROUNDS, round_checkpoint, timeless
from tests.support.runs import make_run
from trainer.checkpoint import Checkpointer
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop import control
from trainer.loop.consistency import check_consistency, model_fingerprint
from trainer.loop.fit import fit
from trainer.loop.options import ClipOptions
from trainer.loop.stopping import Preempted
from trainer.loop.train_state import TrainState
from trainer.models import GPT
from trainer.models.boxes import Box

LOSSY = [name for name, case in CASES.items() if "update_compression" in case.choices]
CUT_ELSEWHERE = ["streaming"]  # into fragments of the vector, in which what the parts have in common is last


class Divisible(nn.Sequential):
    """Two layers with a Tanh between, the first cut by outputs and the second by inputs."""

    def __init__(self):
        super().__init__(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.tp_plan = {"0": "colwise", "2": "rowwise"}


def make_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Divisible().double()


@dataclass(frozen=True)
class Held:
    """The parts that a rank has after a run.

    Attributes:
        regions: of each shared parameter its box, and the values.
        repeated: the names of what other parts have too.
        rounds: the figures of the rounds.
        bytes: that all silos have sent.
    """

    regions: dict[str, tuple[Box, Tensor]]
    repeated: set[str]
    rounds: list[Metrics]
    bytes: int


def train(name: str, choices: Mapping[str, Any], silos: int, shard: int = 1, tensor: int = 1) -> Held:
    """Train a row of the table; each rank calls this."""
    states: list[TrainState] = []
    records = Records()
    with distributed(silos_of(name, silos), device="cpu", shard=shard, tensor=tensor) as topology:
        fit(case_run(topology, name, {"module": make_module(), **choices}), [records], on_start=states.append)
        model = states[0].model
        check_consistency(topology, model_fingerprint(model), model)
        views = model.named_views(model.shared)
        regions = {name: (model.boxes[name], view.clone()) for name, view in views.items()}
        return Held(regions, model.repeated_names, records.rounds, states[0].transport.bytes_sent)


def assert_same_run(ours: list[Held], whole: Held, tolerance: float = 1e-9) -> None:
    for rank in ours:
        for name, (box, values) in rank.regions.items():
            torch.testing.assert_close(values, whole.regions[name][1][box.slices], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(ours[0].rounds, whole.rounds, strict=True):
        assert figures(mine) == pytest.approx(figures(theirs), rel=max(tolerance, 1e-9), nan_ok=True)
    assert_repeated_are_equal(ours)


def assert_repeated_are_equal(ranks: list[Held]) -> None:
    """Assert that what several parts have is equal on them, bit for bit."""
    for rank in ranks:
        for name in rank.repeated & set(rank.regions):
            box, values = rank.regions[name]
            same = [other.regions[name][1] for other in ranks if other.regions[name][0] == box]
            assert all(torch.equal(values, other) for other in same)


EXACT = [name for name in CASES if name not in (*LOSSY, *CUT_ELSEWHERE)]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.quick_rows(3)
def test_two_tensor_ranks_are_one_rank(ranks, name: str):
    """Two silos of two ranks are two silos of one: weights, norms and all figures."""
    size = 1 if name == "sync" else 2
    ours = ranks(2 * size).run(train, name, {"rounds": 3}, 2, 1, 2)
    (whole, *_) = ranks(max(size, 1)).run(train, name, {"rounds": 3}, 2)
    assert_same_run(ours, whole)


def test_a_clipped_gradient_has_the_norm_of_the_whole(ranks):
    """A grid of two shards and two tensor ranks in one silo."""
    choices = {"clip": ClipOptions(max_norm=0.05), "rounds": 3}
    ours = ranks(4).run(train, "sync", choices, 1, 2, 2)
    (whole, *_) = ranks(1).run(train, "sync", choices, 1)
    assert_same_run(ours, whole)


def train_with_dropout() -> set[str]:
    with distributed(device="cpu", tensor=2) as topology:
        module = GPT(vocabulary=64, length=16, layers=1, heads=2, width=16, dropout=0.2)
        states: list[TrainState] = []
        fit(make_run(topology, [16], "gpt", module=module), on_start=states.append)  # which checks the parts
        return states[0].model.repeated_names


def test_dropout_leaves_the_parts_equal_where_they_overlap(ranks):
    """Both draw the same numbers."""
    assert all("norm.weight" in names for names in ranks(2).run(train_with_dropout))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.quick_rows(1)
def test_lossy_updates_leave_the_parts_equal_where_they_overlap(ranks, name: str):
    """Each part is encoded by itself, and what parts have in common by one of them."""
    ours = ranks(4).run(train, name, {"rounds": 3}, 2, 1, 2)
    (whole, *_) = ranks(2).run(train, name, {"rounds": 3}, 2)
    assert_repeated_are_equal(ours)
    for rank in ours:
        for name, (box, values) in rank.regions.items():
            torch.testing.assert_close(values, whole.regions[name][1][box.slices], rtol=0, atol=0.5)


@pytest.mark.parametrize("name", ["fedavg", "median"])
def test_what_parts_have_in_common_is_sent_once(ranks, name: str):
    """The bytes are those of the numbers of both vectors: the second rank leaves out the bias of the second layer."""
    ours = ranks(4).run(train, name, {"rounds": 1}, 2, 1, 2)
    (whole, *_) = ranks(2).run(train, name, {"rounds": 1}, 2)
    # Each parameter has whole cache lines, of 8 numbers; the end of a vector has two, those of the bias among them.
    first, second, length = 24 + 8 + 16 + 16, 24 + 8 + 16, 48 + 8 + 24 + 16
    assert {rank.bytes * length for rank in ours} == {whole.bytes * (first + second)}


Cut = tuple[int, int, int]  # silos, shards and tensor ranks


def run_rounds(name: str, cut: Cut, choices: Mapping[str, Any], folder: Path, until: int, resume: bool) -> Records:
    """Train to round `until`, from the start or from the newest checkpoint in the folder; return the metrics."""
    silos, shard, tensor = cut
    with distributed(silos, device="cpu", shard=shard, tensor=tensor) as topology:
        run = case_run(topology, name, {"rounds": ROUNDS, "module": make_module(), **choices})
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        records = Records()
        fit(run, [records], checkpoints, checkpoints.latest() if resume else None, until=until)
        return records


@pytest.mark.parametrize(
    ("first", "then"),
    [((2, 1, 2), (2, 1, 2)), ((2, 1, 2), (2, 1, 1)), ((2, 1, 1), (1, 2, 2)), ((1, 2, 2), (2, 1, 2))],
    ids=str,
)
@pytest.mark.parametrize("name", ["fedavg_adam", "diloco", "scaffold"])
@pytest.mark.quick_rows(2)
def test_a_run_resumes_on_other_parts(ranks, name: str, first: Cut, then: Cut, tmp_path: Path):
    """Also what one part alone keeps of numbers that several have: the state of the server optimizer."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = ranks(2).run(run_rounds, name, (2, 1, 1), {}, whole, ROUNDS, False)[0]
    ranks(4).run(run_rounds, name, first, {}, parts, ROUNDS - 2, False)
    resumed = ranks(4).run(run_rounds, name, then, {}, parts, ROUNDS, True)[0]
    ours, theirs = (whole_model(round_checkpoint(path, ROUNDS)) for path in (parts, whole))
    assert_close(ours, theirs, 1e-10)
    for our_round, their_round in zip(resumed.rounds, expected.rounds[-2:], strict=True):
        assert timeless(our_round) == pytest.approx(timeless(their_round), rel=1e-8, nan_ok=True)


def run_part(name: str, cut: Cut, folder: Path, orders: Orders) -> Records | None:
    """Train from the newest checkpoint to the end, or until silos leave in the middle of a round."""
    silos, shard, tensor = cut
    choices: dict[str, Any] = {"rounds": ROUNDS, "checkpoint.every_rounds": 1, "module": make_module()}
    with (
        distributed(silos, device="cpu", shard=shard, tensor=tensor) as topology,
        patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0),
    ):
        run = case_run(topology, name, choices | LONG)
        checkpoints, records = Checkpointer(folder, topology, run.assignment_digest), Records()
        try:
            fit(run, [records], checkpoints, checkpoints.latest(), control=contact_of(topology, orders))
        except Preempted:
            return None
        return records


@pytest.mark.parametrize(("first", "then"), [((2, 1, 2), (2, 1, 1)), ((2, 1, 1), (2, 1, 2))], ids=str)
@pytest.mark.parametrize("name", ["diloco", "scaffold"])
@pytest.mark.quick_rows(1)
def test_a_round_resumes_on_other_parts(ranks, name: str, first: Cut, then: Cut, tmp_path: Path):
    """In the middle: what one rank has counted of examples that two have seen is counted once."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = ranks(4).run(run_part, name, then, whole, {})[0]
    assert ranks(4).run(run_part, name, first, parts, LEAVING)[0] is None
    resumed = ranks(4).run(run_part, name, then, parts, {})[0]
    ours, theirs = (whole_model(round_checkpoint(path, ROUNDS)) for path in (parts, whole))
    assert_close(ours, theirs, 1e-10)
    for our_round, their_round in zip(resumed.rounds[::-1], expected.rounds[::-1], strict=False):
        assert timeless(our_round) == pytest.approx(timeless(their_round), rel=1e-8, nan_ok=True)
