"""A run resumes on other parts of the model than those that saved it: with the same results, whatever was cut how."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.laws.cases import CASES, Records, assert_close, assert_same, case_run, leaves
from tests.laws.test_midround import Orders, contact_of
from tests.laws.test_resume import INTERRUPTED, ROUNDS, round_checkpoint, timeless
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.format import SavedState
from trainer.checkpoint.model_cut import CUT, whole_tensors
from trainer.checkpoint.model_files import read_all
from trainer.distributed.parallel_dims import ShardSpec
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop import control
from trainer.loop.fit import fit
from trainer.loop.stopping import Preempted

Cut = tuple[SiloSpec, ShardSpec]


def whole_model(saved: SavedState) -> dict[str, Tensor]:
    return read_all(whole_tensors(saved, "model"))


# What a codec loses depends on the cut.
ROWS = [name for name in CASES if name not in ("sync", "powersgd", "int8", "int4_scaffold", "topk")]


def run_rounds(name: str, cut: Cut, choices: dict[str, Any], folder: Path, until: int, resume: bool) -> Records:
    """Train to round `until`, from the start or from the newest checkpoint in the folder; return the metrics."""
    silos, shard = cut
    with distributed(silos, shard=shard) as topology:
        run = case_run(topology, name, {"rounds": ROUNDS, "checkpoint.every_rounds": INTERRUPTED} | choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        records = Records()
        fit(run, [records], checkpoints, checkpoints.latest() if resume else None, until=until)
        return records


@pytest.mark.parametrize("then", [(2, 2), (2, 1), (1, "full"), (1, 2)], ids=str)
@pytest.mark.parametrize("first", [(2, 2), (2, 1), (1, "full")], ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.quick_rows(6)
def test_a_run_resumes_on_other_parts(ranks, name: str, first: Cut, then: Cut, tmp_path: Path):
    choices: dict[str, Any] = {} if name == "diloco" else {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    choices = {} if name in ("scaffold", "fednova") else choices
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = ranks(4).run(run_rounds, name, (2, 1), choices, whole, ROUNDS, False)[0]
    ranks(4).run(run_rounds, name, first, choices, parts, INTERRUPTED, False)
    resumed = ranks(4).run(run_rounds, name, then, choices, parts, ROUNDS, True)[0]
    ours, theirs = (whole_model(round_checkpoint(path, ROUNDS)) for path in (parts, whole))
    assert_close(ours, theirs, 1e-10)
    for our_round, their_round in zip(resumed.rounds, expected.rounds[INTERRUPTED:], strict=True):
        assert timeless(our_round) == pytest.approx(timeless(their_round), rel=1e-8, nan_ok=True)


def run_part(name: str, cut: Cut, choices: dict[str, Any], folder: Path, orders: Orders) -> Records | None:
    """Train from the newest checkpoint to the end, or until silos leave in the middle of a round."""
    silos, shard = cut
    with distributed(silos, shard=shard) as topology, patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0):
        run = case_run(topology, name, {"rounds": ROUNDS, "checkpoint.every_rounds": 1} | choices)
        checkpoints, records = Checkpointer(folder, topology, run.assignment_digest), Records()
        try:
            fit(run, [records], checkpoints, checkpoints.latest(), control=contact_of(topology, orders))
        except Preempted:
            return None
        return records


LEAVING: Orders = {0: (1, 2), 1: "round 2: combining"}
LONG = {"sizes": [4 * size for size in (3, 12, 7, 20, 5, 9, 16)], "batch_size": 10}


@pytest.mark.parametrize("then", [2, 1])
@pytest.mark.parametrize("first", [2, 1])
@pytest.mark.parametrize("name", ["fedavg_adam", "diloco", "scaffold", "feddyn", "averaging", "local"])
@pytest.mark.quick_rows(4)
def test_a_round_resumes_on_other_parts(ranks, name: str, first: ShardSpec, then: ShardSpec, tmp_path: Path):
    """In the middle: sums, the client in training and its optimizer are cut anew. Uncut, all bits are the same."""
    choices = LONG | ({} if name == "diloco" else {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.5)})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = ranks(4).run(run_part, name, (2, then), choices, whole, {})[0]
    assert ranks(4).run(run_part, name, (2, first), choices, parts, LEAVING)[0] is None
    resumed = ranks(4).run(run_part, name, (2, then), choices, parts, {})[0]
    ours, theirs = (round_checkpoint(path, ROUNDS) for path in (parts, whole))
    if first == then:
        for part in range(ours.load(CUT)["parts"]):
            for section in ("model", "algorithm", "clients"):
                assert_same(leaves(ours.load(section, part=part)), leaves(theirs.load(section, part=part)))
    assert_close(whole_model(ours), whole_model(theirs), 1e-10)
    for our_round, their_round in zip(resumed.rounds[::-1], expected.rounds[::-1], strict=False):
        assert timeless(our_round) == pytest.approx(timeless(their_round), rel=1e-8, nan_ok=True)


MOMENTUM = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}


@pytest.mark.parametrize(
    ("first", "then"), [((2, 2), (1, 1)), ((1, 1), (3, "full")), ((3, "full"), (2, 2)), ((2, 2), (3, "full"))], ids=str
)
@pytest.mark.parametrize("is_within", [False, True])
@pytest.mark.parametrize("name", ["local", "fedavg_adam"])
@pytest.mark.quick_rows(2)
def test_a_run_resumes_on_other_ranks(
    ranks, name: str, is_within: bool, first: tuple[int, ShardSpec], then: tuple[int, ShardSpec], tmp_path: Path
):
    """Two silos with other numbers of ranks and parts, uneven ones among them: between rounds, and within one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    choices = MOMENTUM | LONG
    (before, cut), (now, other) = first, then
    if is_within:
        ranks(4).run(run_part, name, (2, 1), choices, whole, {})
        assert ranks(2 * before).run(run_part, name, (2, cut), choices, parts, LEAVING)[0] is None
        ranks(2 * now).run(run_part, name, (2, other), choices, parts, {})
    else:
        ranks(4).run(run_rounds, name, (2, 1), choices, whole, ROUNDS, False)
        ranks(2 * before).run(run_rounds, name, (2, cut), choices, parts, INTERRUPTED, False)
        ranks(2 * now).run(run_rounds, name, (2, other), choices, parts, ROUNDS, True)
    ours, theirs = (whole_model(round_checkpoint(path, ROUNDS)) for path in (parts, whole))
    assert_close(ours, theirs, 1e-10)
