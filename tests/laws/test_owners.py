"""No two parts of a run that was loaded from a checkpoint share memory that they write to."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from tests.laws.cases import CASES, COMBINED, adam, case_run, nesterov, silos_of
from tests.laws.test_midround import LeavesAt
from tests.laws.test_resume import noisy_choices
from trainer.algorithms import Streaming
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.format import iter_leaves
from trainer.distributed.topology import distributed
from trainer.loop import control
from trainer.loop.checkpointing import restore
from trainer.loop.control import LoopControl
from trainer.loop.fit import fit
from trainer.loop.stopping import Preempted
from trainer.loop.train_state import TrainState
from trainer.models import flat

Pairs = set[tuple[str, str]]
ROUNDS = 2


def shared_memory(state: TrainState) -> Pairs:
    """Return the pairs of leaves of a run's state that have memory in common."""
    trainer = state.trainer
    tree = {
        "model": {"shared": state.model.shared, "personal": state.model.personal},
        "global": state.algorithm.global_state(),
        "algorithm": state.algorithm.state_dict() | state.algorithm.sharded_state_dict(),
        "clients": {str(client): kept for client, kept in trainer.clients.states.items()},
        "initial": trainer.clients.initial_personal_state,
        "step": trainer.step.state_dict(),
        "gradients": trainer.step.gradient_reducer.state_dict(),
        "transport": state.transport.state_dict(),
        "statistics": {"vector": trainer.statistics.vector, "counts": trainer.statistics.counts},
        "participations": state.participations,
        "ema": {"vector": state.ema.vector} if state.ema else {},
    }
    spans = {
        name: (leaf.data_ptr(), leaf.data_ptr() + leaf.nbytes)
        for name, leaf in iter_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.nbytes
    }
    pairs = combinations(spans.items(), 2)
    return {(a, b) for (a, (first, end)), (b, (start, stop)) in pairs if first < stop and start < end}


def trained_and_restored(name: str, choices: dict, folder: Path, leave: bool) -> tuple[Pairs, Pairs]:
    """Train, stopped in the middle of the second round or not; return what shares memory then, and when restored."""
    states: list[TrainState] = []
    with (
        distributed(silos_of(name, 2)) as topology,
        patch.object(flat, "BLOCK", 16),
        patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0),
    ):
        run = case_run(topology, name, {"rounds": ROUNDS + 1, "checkpoint.every_rounds": 1} | choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        asked = LeavesAt(0, 1) if leave else LoopControl()
        try:
            fit(run, (), checkpoints, on_start=states.append, until=ROUNDS, control=asked)
        except Preempted:
            assert leave
        start = Checkpointer(folder, topology, run.assignment_digest).latest()
        assert start and bool(start.mid_round) == leave
        with patch.object(flat, "BLOCK", 8):  # two blocks to load from one
            restored = TrainState(run)
            restore(restored, start)
        return shared_memory(states[0]), shared_memory(restored)


@pytest.mark.parametrize(
    ("name", "leave"),
    [*((name, True) for name in CASES), *((name, False) for name in ("fedavg_adam", "diloco", "local"))],
)
@pytest.mark.quick_rows(8)
def test_restored_states_share_no_memory(ranks, name: str, leave: bool, tmp_path: Path):
    """In several blocks, with batch statistics, an average of the weights where there is one, and clients' states."""
    choices = noisy_choices(name) | ({"ema_decay": 0.9} if name in ("sync", *COMBINED) else {})
    for trained, restored in ranks(2).run(trained_and_restored, name, choices, tmp_path, leave):
        assert restored <= trained


@pytest.mark.parametrize("server", [adam, nesterov], ids=["adam", "nesterov"])
def test_fragments_share_no_memory(ranks, server, tmp_path: Path):
    """Fragments that moved a different number of times, each of several blocks."""
    choices = {"algorithm": Streaming(server=server, fragments=3, overlap_steps=1)}
    for trained, restored in ranks(2).run(trained_and_restored, "streaming", choices, tmp_path, False):
        assert restored <= trained
