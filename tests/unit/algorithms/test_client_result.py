"""ClientResult: the sums of a client's round, saved in the middle and resumed to the last bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms import client_result
from trainer.algorithms.client_result import ClientResult, client_result_from_state, merge_client_results
from trainer.checkpoint.format import Shard, find_saved, part_name, write_shard

laws = settings(deadline=None)

# Sums of such numbers depend on their order and grouping.
losses = st.floats(-1e6, 1e6, width=32).map(torch.tensor)
steps = st.lists(st.tuples(st.integers(0, 32), losses, st.integers(0, 64)), max_size=20)
KEPT = 4  # losses that are kept before they are added up; a run keeps a thousand


@pytest.fixture(autouse=True)
def few_losses_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_result, "MAX_PENDING_LOSSES", KEPT)


def work_after(taken: list[tuple[int, torch.Tensor, int]], begun: ClientResult | None = None) -> ClientResult:
    """Return the ClientResult of a client, new or `begun`, after these steps."""
    one = begun or ClientResult(client=7, weight=100)
    for examples, loss, units in taken:
        one.add(examples, loss, units)
    return one


def counts(one: ClientResult) -> tuple[int, ...]:
    return one.client, one.weight, one.examples_seen, one.steps, one.units


@laws
@given(steps)
def test_losses_are_added_up(taken: list[tuple[int, torch.Tensor, int]]):
    """Losses are summed in float64, exact to rounding. Examples, units and steps are counted."""
    one = work_after(taken)
    exact = math.fsum(loss.item() for _, loss, _ in taken)
    assert one.loss_sum == pytest.approx(exact, rel=1e-14, abs=1e-14 * sum(abs(loss.item()) for _, loss, _ in taken))
    assert counts(one) == (7, 100, sum(t[0] for t in taken), len(taken), sum(t[2] for t in taken))
    assert one.loss_sum == one.loss_sum


def test_few_losses_are_kept():
    """Their number is bounded, however many steps a round has."""
    one = ClientResult(client=0, weight=1)
    for _ in range(10 * KEPT + 1):
        one.add(1, torch.tensor(0.5), 1)
        assert len(one.losses) < KEPT
    assert one.loss_sum == 0.5 * (10 * KEPT + 1)


@laws
@given(steps, steps)
def test_saved_in_the_middle_it_is_the_same_to_the_last_bit(before: list, rest: list):
    """It may be saved anywhere between two sums, any number of times; saving changes nothing."""
    through, saved = work_after(before + rest), work_after(before)
    assert saved.state_dict().keys() == saved.state_dict().keys()
    resumed = work_after(rest, client_result_from_state(client_result_from_state(saved.state_dict()).state_dict()))
    went_on = work_after(rest, saved)
    assert resumed.loss_sum == went_on.loss_sum == through.loss_sum
    assert counts(resumed) == counts(went_on) == counts(through)


def test_all_of_it_is_saved(tmp_path: Path):
    """Tensors and numbers are saved to a file; a measured value is a number afterwards."""
    one = work_after([(8, torch.tensor(0.1), 8), (8, torch.tensor(0.2), 8)])
    one.gradient_norm, one.learning_rate = torch.tensor(1 / 3), 0.07
    one.seconds_data, one.seconds_compute = 0.25, math.pi
    write_shard(tmp_path, Shard("a", ("a",), "first"), {part_name(0): {"work": one.state_dict()}})
    saved = find_saved(tmp_path)
    assert saved is not None
    loaded = client_result_from_state(saved.load("work"))
    assert [loss.item() for loss in loaded.losses] == [loss.item() for loss in one.losses]
    assert loaded.loss_sum == one.loss_sum and counts(loaded) == counts(one)
    assert loaded.gradient_norm == float(one.gradient_norm)
    assert (loaded.learning_rate, loaded.seconds_data, loaded.seconds_compute) == (0.07, 0.25, math.pi)


def test_losses_that_are_no_numbers_stay_so():
    one = work_after([(1, torch.tensor(math.nan), 1)] * (KEPT + 1))
    assert math.isnan(client_result_from_state(one.state_dict()).loss_sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_saved_in_their_precision(dtype: torch.dtype):
    one = work_after([(1, torch.tensor(1 / 3, dtype=dtype), 1)] * 3)
    assert (
        client_result_from_state(one.state_dict()).loss_sum
        == one.loss_sum
        == 3 * float(torch.tensor(1 / 3, dtype=dtype))
    )


def test_the_loss_of_the_last_step_is_a_mean():
    assert work_after([(4, torch.tensor(5.0), 2), (4, torch.tensor(6.0), 4)]).last_loss() == 1.5
    assert work_after([(0, torch.tensor(0.0), 0)]).last_loss() == 0.0


@laws
@given(st.lists(steps, min_size=1, max_size=4), st.integers(1, 4))
def test_replicas_that_are_more_or_fewer_share_what_was_done(parts: list[list], replicas: int):
    """The sums over the replicas do not change; each replica has the values that are equal in the silo."""
    before = [work_after(part) for part in parts]
    states = [one.state_dict() for one in before]
    after = [
        merge_client_results([client_result_from_state(state) for state in states], replica)
        for replica in range(replicas)
    ]
    assert math.fsum(one.loss_sum for one in after) == sum(one.loss_sum for one in before)
    assert sum(one.units for one in after) == sum(one.units for one in before)
    assert {counts(one)[:4] for one in after} == {counts(before[0])[:4]}
