"""Where a forward pass is a collective, ranks with unequal shares make as many: nobody waits, and nothing changes."""

from __future__ import annotations

import signal
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.cases import Records, figures
from tests.support.runs import make_run
from trainer.algorithms import FedAvg
from trainer.distributed.parallel_dims import ShardSpec
from trainer.distributed.sharding import can_pass_alone
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.loop.train_state import TrainState
from trainer.models.boxes import Box

WATCHDOG_SECONDS = 60  # after which a rank that still waits ends, and the test with it

CASES: dict[str, dict[str, Any]] = {
    "micro-batches of unequal number": {"batch_size": 17, "micro_batch_size": 8},
    "more replicas than examples in the last batch": {"batch_size": 7, "micro_batch_size": 1},
    "evaluation one by one": {"batch_size": 12, "eval.batch_size": 1},
    "evaluation by threes": {"batch_size": 12, "eval.batch_size": 3},
    "a micro-batch that is found": {"batch_size": 12, "micro_batch_size": "auto"},
}

Parts = dict[str, tuple[Box, Tensor]]


def trained(silos: SiloSpec, shard: ShardSpec, choices: dict[str, Any]) -> tuple[Parts, list[Metrics]]:
    """Return this rank's part of the model after two rounds, and their figures."""
    signal.alarm(WATCHDOG_SECONDS)
    states: list[TrainState] = []
    with distributed(silos, shard=shard, device="cpu") as topology:
        optimizer, records = partial(torch.optim.SGD, lr=0.1), Records()
        sizes = [25] * topology.num_silos
        run = make_run(topology, sizes, "gpt", FedAvg(), rounds=2, optimizer=optimizer, **choices)
        fit(run, [records], on_start=states.append)
        model = states[0].model
        parts = {name: (model.boxes[name], p.detach().clone()) for name, p in model.named_trainable}
    signal.alarm(0)
    return parts, [figures(metrics) for metrics in records.rounds]


@pytest.mark.parametrize("cut", [(2, 2), (1, 2), (1, "full")], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_rows(3)
def test_unequal_shares_are_those_of_whole_replicas(ranks, case: str, cut: tuple[SiloSpec, ShardSpec]):
    if CASES[case].get("micro_batch_size") == "auto" and not can_pass_alone():
        pytest.skip("this torch cannot continue after a pass that did not fit; see test_refused_parts.py")
    whole = ranks(4).run(trained, cut[0], 1, CASES[case])
    for (parts, rounds), (expected, their_rounds) in zip(ranks(4).run(trained, *cut, CASES[case]), whole, strict=True):
        for name, (box, values) in parts.items():
            torch.testing.assert_close(values, expected[name][1][box.slices], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(rounds, their_rounds, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6, nan_ok=True)
