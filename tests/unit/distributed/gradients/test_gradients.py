"""Averaged gradients: how far from the mean they may be, that nothing is lost on the way, and what overflows do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.gradients import SHAPES, Loss, Silo, decreed, flat, in_silo
from trainer.distributed.gradients import (
    FullPrecisionReducer,
    GradientReducer,
    HalfPrecisionReducer,
    Int8Reducer,
    PowerSGDReducer,
)
from trainer.distributed.topology import Topology

WAYS: dict[str, GradientReducer] = {
    "fp32": FullPrecisionReducer(),
    "bf16": HalfPrecisionReducer("bfloat16"),
    "fp16": HalfPrecisionReducer("float16"),
    "int8": Int8Reducer(block=8),
    "powersgd": PowerSGDReducer(rank=2, start=2),
}
FEEDING_BACK = ["int8", "powersgd"]
U = {"bf16": 2**-8, "fp16": 2**-11}
ROUNDING = 2e-6  # of float32, over some steps
SIZES = [2, 3, 4]


def averaged(topology: Topology, way: str, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The means of each step on this rank, and what it owes after each."""
    silo = Silo(WAYS[way], topology)
    pairs = [(silo.step(given), silo.owed().clone()) for given in decreed(topology.replica, steps)]
    return [mean for mean, _ in pairs], [owed for _, owed in pairs]


def given_to(size: int, steps: int) -> list[np.ndarray]:
    """What the replicas are given in each step, [replicas, n] in float64."""
    replicas = [decreed(replica, steps) for replica in range(size)]
    return [np.stack([flat(given[step]).double().numpy() for given in replicas]) for step in range(steps)]


def all_averaged(pool, way: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The means [steps, n], equal on all ranks to the last bit, and what is owed [steps, replicas, n]; float64."""
    answers = pool.run(in_silo, averaged, way, steps)
    for means, _ in answers[1:]:
        assert all(map(torch.equal, means, answers[0][0]))
    owed = [torch.stack([owed[step] for _, owed in answers]).double().numpy() for step in range(steps)]
    return torch.stack(answers[0][0]).double().numpy(), np.stack(owed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["fp32", "bf16", "fp16"])
def test_a_mean_without_feedback_is_within_its_bound(ranks, size: int, way: str):
    """(R + 1) u times the mean of the sizes: one rounding of each, one of the division, and R - 1 of the sum.

    In float16 also one of the smallest steps that it has, 2^-24, each time.
    """
    means, _ = all_averaged(ranks(size), way, 3)
    for mean, given in zip(means, given_to(size, 3), strict=True):
        bound = (size + 1) * U.get(way, 2**-24) * np.abs(given).mean(0) * 1.01
        assert (np.abs(mean - given.mean(0)) <= bound + (size * 2**-24 if way == "fp16" else 0)).all()


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_within_its_bound_after_any_number_of_steps(ranks, size: int):
    """All that was given is sent, but for m / 250 between two replicas and m / 120 between more, m the largest of all.

    What a single replica owes is more: R times what it lost of the mean.
    """
    means, owed = all_averaged(ranks(size), "int8", 60)
    givens = given_to(size, 60)
    largest = max(np.abs(given).max() for given in givens)
    missing = np.cumsum([given.mean(0) for given in givens], axis=0) - np.cumsum(means, axis=0)
    assert np.abs(missing).max() <= largest / (250 if size == 2 else 120)
    assert np.abs(owed).max() <= largest * (size + 2) / 250
    # That is not for nothing: without feedback errors of this size add up.
    assert np.abs(means[0] - givens[0].mean(0)).max() > largest / 2000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", FEEDING_BACK)
def test_what_is_given_is_sent_or_owed(ranks, size: int, way: str):
    """The sum of all means, and the mean of what the replicas owe, are the mean of all that they were given."""
    means, owed = all_averaged(ranks(size), way, 40)
    givens = given_to(size, 40)
    largest = max(np.abs(given).max() for given in givens)
    given = np.cumsum([given.mean(0) for given in givens], axis=0)
    sent = np.cumsum(means, axis=0)
    assert np.abs(sent + owed.mean(1) - given).max() <= largest * 40 * ROUNDING


@pytest.mark.parametrize("size", [2, 3])
def test_powersgd_is_one_step_of_power_iteration(ranks, size: int):
    """Of the first matrix: P = orthonormal(mean(M) Q), mean P P' M, and M is the gradient and the residual.

    Q is not known here, but the mean is a projection of mean(M) to `rank` dimensions, which is all it can be.
    """
    means, owed = all_averaged(ranks(size), "powersgd", 12)
    rows, columns = SHAPES[0]
    for step, given in enumerate(given_to(size, 12)):
        matrix = given.mean(0)[: rows * columns].reshape(rows, columns)
        sent = means[step][: rows * columns].reshape(rows, columns)
        if step < 2:
            np.testing.assert_allclose(sent, matrix, atol=ROUNDING)
            continue
        before = owed[step - 1].mean(0)[: rows * columns].reshape(rows, columns)
        basis = np.linalg.svd(sent)[0][:, :2]
        assert np.linalg.matrix_rank(sent, tol=1e-4) == 2
        np.testing.assert_allclose(basis @ basis.T @ (matrix + before), sent, atol=1e-4)
    bias = slice(rows * columns, rows * columns + SHAPES[1][0])
    np.testing.assert_allclose(means[5][bias], given_to(size, 12)[5].mean(0)[bias], atol=ROUNDING * 10)


def test_what_powersgd_owes_of_the_mean_does_not_grow(ranks):
    """That of a single replica may: it holds by how much its gradients were not the mean."""
    _, owed = all_averaged(ranks(2), "powersgd", 200)
    missing = np.linalg.norm(owed.mean(1), axis=1)
    assert missing[100:].max() <= 1.5 * missing[10:100].max()


def overflowing(topology: Topology, way: str, bad: float, halves: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The mean of a step in which one replica overflowed, the means after it, and those of a run without that step.

    Such steps come before DDP has ordered its buckets, after that, and when something is owed. If `halves` they are
    followed by half the loss scale.
    """
    loss = Loss(loss_scale=16.0, may_skip=True)
    one, other = Silo(WAYS[way], topology, loss), Silo(WAYS[way], topology)
    other.step([torch.zeros(shape) for shape in SHAPES])  # as if it had overflowed
    ours, theirs = [], []
    for step, given in enumerate(decreed(topology.replica, 9)):
        if step in (0, 1, 5):
            broken = [tensor.clone() for tensor in given]
            broken[3][2, 2] = bad if topology.replica == 1 else 1.0
            mean = one.step([tensor * loss.loss_scale for tensor in broken])
            one.gradients.rollback()
            loss.loss_scale /= 2 if halves else 1
        ours.append(one.step([tensor * loss.loss_scale for tensor in given]) / loss.loss_scale)
        theirs.append(other.step(given))
    return mean, ours, theirs


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_is_seen_by_all_replicas(ranks, size: int, bad: float, way: str):
    """In the same places, so that all leave the step out."""
    means = [mean for mean, _, _ in ranks(size).run(in_silo, overflowing, way, bad, False)]
    places = [mean.isfinite() for mean in means]
    assert not places[0].all()
    assert all(torch.equal(place, places[0]) for place in places)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("halves", [False, True])
def test_a_step_that_is_left_out_leaves_no_trace(ranks, size: int, halves: bool):
    """int8: to the last bit, though DDP had ordered its buckets; under another loss scale too, a power of two."""
    for _, ours, theirs in ranks(size).run(in_silo, overflowing, "int8", float("inf"), halves):
        assert all(map(torch.equal, ours, theirs))


def powersgd_overflows(topology: Topology, way: str) -> tuple[list[Tensor], list[Tensor]]:
    """The same with steps before and after the first compressed one."""
    loss = Loss(may_skip=True)
    one, other = Silo(WAYS[way], topology, loss), Silo(WAYS[way], topology)
    ours, theirs = [], []
    for step, given in enumerate(decreed(topology.replica, 9)):
        ours.append(one.step(given))
        theirs.append(other.step(given))
        if step in (3, 6):
            one.step([tensor * float("nan") for tensor in given])
            one.gradients.rollback()
    return ours, theirs


def test_powersgd_takes_up_where_it_was(ranks):
    for ours, theirs in ranks(2).run(in_silo, powersgd_overflows, "powersgd"):
        assert all(map(torch.equal, ours, theirs))


def gone_on(topology: Topology, way: str, saved_after: int, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The means of a run that is saved after so many steps and goes on as a new one, and of one that just goes on."""
    givens = decreed(topology.replica, 8)
    one = Silo(WAYS[way], topology)
    for given in givens[:saved_after]:
        one.step(given)
    state = one.saved(folder / f"{topology.rank}", f"replica-{topology.replica}")
    two = Silo(WAYS[way], topology)
    two.step([tensor * 0 for tensor in givens[0]])  # as a loaded run does, so that DDP orders its buckets
    two.gradients.load_state_dict(state)
    loaded = copies(state)
    ours = [two.step(given) for given in givens[saved_after:]]
    assert_same_tree(state, loaded)
    return ours, [one.step(given) for given in givens[saved_after:]]


def copies(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: copies(value) if isinstance(value, dict) else value.clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def assert_same_tree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            assert_same_tree(value, theirs[name])
        else:
            assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]


@pytest.mark.parametrize("saved_after", [1, 2, 5])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("way", FEEDING_BACK)
def test_a_saved_state_goes_on_bit_for_bit(ranks, way: str, size: int, saved_after: int, tmp_path: Path):
    """From before DDP ordered its buckets, from after that; what is loaded is not written to."""
    for ours, theirs in ranks(size).run(in_silo, gone_on, way, saved_after, tmp_path):
        assert all(map(torch.equal, ours, theirs))


def states_after(topology: Topology, way: str, steps: int) -> dict[str, Any]:
    silo = Silo(WAYS[way], topology)
    for given in decreed(topology.replica, steps):
        silo.step(given)
    return copies(silo.gradients.state_dict())


@pytest.mark.parametrize("way", FEEDING_BACK)
def test_other_replicas_owe_the_same(ranks, way: str):
    """Three saved: each of however many owes their mean, and the mean of that is the same."""
    states = ranks(3).run(in_silo, states_after, way, 6)
    kind = "residuals" if way == "int8" else "errors"
    one = WAYS[way].reshard(states)
    for name, owed in one[kind].items():
        torch.testing.assert_close(owed, sum(state[kind][name] for state in states) / 3)
    rest = {name: value for name, value in one.items() if name != kind}
    assert_same_tree(rest, {name: states[1][name] for name in rest})


@pytest.mark.parametrize("block", [0, -8, 12, 1])
def test_a_block_that_cannot_be_packed_is_refused(block: int):
    with pytest.raises(ValueError, match=f"gradient_compression.block={block}\n  valid: a multiple of 8"):
        Int8Reducer(block=block)


def test_powersgd_names_all_that_is_too_small():
    with pytest.raises(ValueError, match="gradient_compression.rank=0\n.*\ngradient_compression.start=1\n"):
        PowerSGDReducer(rank=0, start=1)


# Bytes


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (FullPrecisionReducer(), 4 * 600 + 4 * 20),
        (HalfPrecisionReducer(), 2 * 620),
        (Int8Reducer(block=104), 620 + 4 * 6),
        (PowerSGDReducer(rank=3), 4 * 3 * (20 + 30) + 4 * 20),
        (PowerSGDReducer(rank=6), 4 * 620),
    ],
    ids=["fp32", "bf16", "int8", "powersgd", "powersgd that would not save half"],
)
def test_the_size_of_a_matrix_of_20_times_30_and_a_vector_of_20(way: GradientReducer, expected: int):
    """Six blocks with a scale each; thin matrices of 20 and 30 rows, and the vector as it is."""
    assert way.encoded_size([torch.zeros(20, 30), torch.zeros(20)]) == expected


def numbers_sent(topology: Topology) -> tuple[int, int]:
    """What torch's hook counts of the second step that it makes thin, in float32, and what is foretold."""
    way = PowerSGDReducer(rank=1, start=2)
    silo = Silo(way, topology)
    counted = []
    for given in decreed(topology.replica, 4):
        silo.step(given)
        counted.append(silo.gradients.hook.total_numel_after_compression)  # pyright: ignore
    return 4 * (counted[3] - counted[2]), way.encoded_size([torch.zeros(shape) for shape in SHAPES])


def test_the_size_of_thin_matrices_is_what_the_hook_counts(ranks):
    for counted, foretold in ranks(2).run(in_silo, numbers_sent):
        assert counted == foretold < 4 * sum(torch.zeros(shape).numel() for shape in SHAPES)
