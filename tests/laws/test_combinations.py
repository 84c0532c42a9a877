"""Random combinations of choices, stopped twice and killed once, end with the bits of undisturbed runs.

Here the ranks stay alive: what is killed forgets its state. `python -m scripts.chaos --combinations` starts and kills
processes.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest

from scripts.chaos.combinations import Moment, draw
from scripts.chaos.compare import differing_leaves, final_state
from tests.laws.cases import Records, assert_same
from tests.laws.test_resume import timeless
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.loop import control, round
from trainer.loop.checkpointing import make_checkpointer
from trainer.loop.control import LoopControl
from trainer.loop.fit import fit
from trainer.loop.stopping import Preempted

MODEL = ("model=custom", "model._target_=scripts.chaos.cases.Noisy", "+model.width=16", "launch.device=cpu")


class KilledError(Exception):
    """Ends a start on all ranks, as they are about to combine."""


def start(overrides: tuple[str, ...], folder: Path, stop: Moment | None, is_killed: bool) -> Records | None:
    """Train from the newest checkpoint to the end; None if it was stopped or killed before."""
    config = read_config(compose_tree([*MODEL, *overrides, f"run_dir={folder}"]))
    with distributed(config.silos) as topology, patch.object(control, "CONSENSUS_INTERVAL_SECONDS", 0.0):
        run = build(config, topology)
        checkpoints = make_checkpointer(run, folder)
        asked, records = LoopControl(config.checkpoint.every_seconds), Records()
        steps = iter(range(1, 1 << 30))

        def on_step(*_: object) -> None:
            if stop and topology.rank == stop.rank and next(steps) == stop.steps:
                asked.request_stop()

        def die(*_: object) -> None:
            checkpoints.wait()
            raise KilledError

        aggregate = die if is_killed else round.aggregate_round
        try:
            with patch.object(round, "aggregate_round", aggregate):
                fit(run, [records], checkpoints, checkpoints.latest(), on_step, control=asked)
        except (Preempted, KilledError):
            return None
        return records


@pytest.mark.parametrize("seed", ["a", pytest.param("c", marks=pytest.mark.long)])
def test_two_combinations(ranks, seed: str, tmp_path: Path):
    """SCAFFOLD with float16 and int8, Streaming with topk and fine-tuned clients; both with an average of the weights.

    The last checkpoints are compared, and the metrics of the rounds since the last start.
    """
    combination = draw(Random(seed))
    pool, ours, theirs = ranks(combination.ranks), tmp_path / "disturbed", tmp_path / "alone"
    for stop in combination.stops:
        assert pool.run(start, combination.overrides, ours, stop, False)[0] is None
    assert pool.run(start, combination.overrides, ours, None, True)[0] is None
    last = pool.run(start, combination.overrides, ours, None, False)[0]
    alone = pool.run(start, combination.overrides, theirs, None, False)[0]
    assert differing_leaves(final_state(theirs), final_state(ours)) == []
    assert last.rounds
    for one, other in zip(last.rounds[::-1], alone.rounds[::-1], strict=False):
        assert_same(timeless(one), timeless(other))
