"""Compressed updates: on more silos than in the table, resumed in another world, and the point that they reach."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.laws.cases import assert_same, case_run, leaves, train
from tests.laws.quadratics import BOWLS, SIZES, bowl_choices, path
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import INTERRUPTED, assert_bit_equal, noisy_choices, round_checkpoint, run_rounds
from trainer.algorithms import FedAvg
from trainer.checkpoint import ResumePoint
from trainer.checkpoint.format import SavedState
from trainer.data.client_sampling.sampling import AllClients
from trainer.distributed.compression import Cast, Codec, Int4, Int8, PowerSGD, TopK, UpdateCompression
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.checkpointing import restore
from trainer.loop.options import RoundOptions
from trainer.loop.train_state import TrainState

pytestmark = pytest.mark.long

PACKED = ["int8", "topk", "int4_scaffold", "powersgd"]
WORLDS = pytest.mark.parametrize("silos", [4, [2, 2], [3, 1]], ids=["4", "2+2", "3+1"])


@pytest.mark.parametrize("name", PACKED)
def test_four_silos_hold_the_same_bits(ranks, name: str):
    outcomes = ranks(4).run(train, name, 4, noisy_choices(name))
    for other in outcomes[1:]:
        assert_same(other.model, outcomes[0].model)
        assert_same(other.algorithm, outcomes[0].algorithm)


@WORLDS
@pytest.mark.parametrize("name", PACKED)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, name: str, silos: SiloSpec, tmp_path: Path):
    """The residuals of slices and of sums are saved."""
    assert_bit_equal(ranks(4), name, silos, noisy_choices(name), tmp_path)


@WORLDS
@pytest.mark.parametrize("uplink", [Int8(8), PowerSGD(1)], ids=lambda uplink: uplink.name)
def test_fragments_under_way_are_resumed(ranks, uplink: UpdateCompression, silos: SiloSpec, tmp_path: Path):
    """Each fragment has separate residuals; pending sums are in the checkpoint.

    Of 4 silos some have no client in a round, but take part in the last stage of a pending sum.
    """
    choices = noisy_choices("streaming") | {"update_compression": uplink}
    assert_bit_equal(ranks(4), "streaming", silos, choices, tmp_path / "rounds")
    everyone = choices | {"client_sampling": AllClients()}
    assert_left_and_bit_equal(ranks(4), "streaming", silos, everyone, tmp_path / "inside", {0: (0, 2)})


@WORLDS
def test_silos_leave_in_the_middle_of_a_round(ranks, silos: SiloSpec, tmp_path: Path):
    choices = noisy_choices("int8") | {"round": RoundOptions(steps=9)}
    assert_left_and_bit_equal(ranks(4), "int8", silos, choices, tmp_path, {0: (0, 2)})


def residuals_here(name: str, silos: SiloSpec, choices: dict[str, Any], saved: SavedState) -> dict[str, Any]:
    """Return the residuals of this rank after resuming from the checkpoint of another world."""
    with distributed(silos) as topology:
        state = TrainState(case_run(topology, name, choices))
        restore(state, ResumePoint(0, saved))
        return leaves(state.transport.state_dict())


def added_up(pieces: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the sum of the residuals of each vector."""
    sums: dict[str, torch.Tensor] = {}
    for name, piece in pieces.items():
        *_, vector, _, start = name.split("/")
        total = sums.setdefault(vector, torch.zeros(1024, dtype=torch.float64))
        total[int(start) : int(start) + len(piece)] += piece
    return sums


@pytest.mark.parametrize("after", [1, 2, [3, 1]], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4_scaffold"])
def test_what_is_still_to_be_sent_goes_on_elsewhere(ranks, name: str, after: SiloSpec, tmp_path: Path):
    """Residuals that four silos have saved are distributed to other silos without loss."""
    choices = noisy_choices(name)
    ranks(4).run(run_rounds, name, 4, choices, tmp_path, INTERRUPTED, False)
    saved = round_checkpoint(tmp_path, INTERRUPTED)
    pool = ranks(4 if isinstance(after, list) else after)
    taken = pool.run(residuals_here, name, after, choices, saved)
    ours = added_up({f"{rank}/{name}": piece for rank, held in enumerate(taken) for name, piece in held.items()})
    expected = added_up(leaves(saved.load("residuals")))
    assert ours.keys() == expected.keys() and all(bool(total.any()) for total in expected.values())
    for vector, total in expected.items():
        torch.testing.assert_close(ours[vector], total, rtol=0, atol=1e-7)


@pytest.mark.parametrize("silos", [2, 4])
@pytest.mark.parametrize(
    ("codec", "apart"),
    [(Cast("bfloat16"), 0.003), (Cast("float16"), 0.0006), (Int8(8), 0.004), (Int4(8), 0.1), (TopK(0.4), 1.0)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_packed_silos_stay_around_the_known_point(ranks, codec: Codec, apart: float, silos: int):
    """FedAvg of one step goes to the minimum of all clients' bowls.

    Compressed, it stays within the size of the residual.

    That does not vanish, because the clients' updates do not vanish there.
    """
    choices = bowl_choices(rounds=60, update_compression=codec, round=RoundOptions(steps=1))
    places = ranks(silos).run(path, silos, partial(FedAvg), choices)[0]
    distances = np.linalg.norm(places - BOWLS.optimum(SIZES), axis=1)
    assert distances[0] > 7 and distances[30:].mean() < apart
