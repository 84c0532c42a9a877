"""Reducers: the error of the mean, error feedback, overflows, and resumed states."""

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

REDUCERS: dict[str, GradientReducer] = {
    "fp32": FullPrecisionReducer(),
    "bf16": HalfPrecisionReducer("bfloat16"),
    "fp16": HalfPrecisionReducer("float16"),
    "int8": Int8Reducer(block=8),
    "powersgd": PowerSGDReducer(rank=2, start=2),
}
WITH_FEEDBACK = ["int8", "powersgd"]
U = {"bf16": 2**-8, "fp16": 2**-11}
ROUNDING = 2e-6  # of float32, over several steps
SIZES = [2, 3, 4]


def averaged(topology: Topology, name: str, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the mean of each step on this rank, and the residuals after it."""
    silo = Silo(REDUCERS[name], topology)
    pairs = [(silo.step(given), silo.residuals().clone()) for given in decreed(topology.replica, steps)]
    return [mean for mean, _ in pairs], [residuals for _, residuals in pairs]


def given_to(size: int, steps: int) -> list[np.ndarray]:
    """Return the gradients of all replicas in each step, [replicas, n] in float64."""
    replicas = [decreed(replica, steps) for replica in range(size)]
    return [np.stack([flat(given[step]).double().numpy() for given in replicas]) for step in range(steps)]


def all_averaged(pool, name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means [steps, n], the same on all ranks, and the residuals [steps, replicas, n], in float64."""
    answers = pool.run(in_silo, averaged, name, steps)
    for means, _ in answers[1:]:
        assert all(map(torch.equal, means, answers[0][0]))
    residuals = [torch.stack([residuals[step] for _, residuals in answers]).double().numpy() for step in range(steps)]
    return torch.stack(answers[0][0]).double().numpy(), np.stack(residuals)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.quick_rows(3)
def test_a_mean_without_feedback_is_within_its_bound(ranks, size: int, name: str):
    """(R + 1) u times the mean magnitude: a rounding of each, one of the division, and R - 1 of the sum.

    In float16 each rounding also adds 2^-24, its smallest step.
    """
    means, _ = all_averaged(ranks(size), name, 3)
    for mean, given in zip(means, given_to(size, 3), strict=True):
        bound = (size + 1) * U.get(name, 2**-24) * np.abs(given).mean(0) * 1.01
        assert (np.abs(mean - given.mean(0)) <= bound + (size * 2**-24 if name == "fp16" else 0)).all()


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_within_its_bound_after_any_number_of_steps(ranks, size: int):
    """The means lack at most m / 250 between two replicas and m / 120 between more, m the largest gradient.

    The residual of a single replica is larger: it has R times the error of its part of the mean.
    """
    means, residuals = all_averaged(ranks(size), "int8", 60)
    givens = given_to(size, 60)
    largest = max(np.abs(given).max() for given in givens)
    missing = np.cumsum([given.mean(0) for given in givens], axis=0) - np.cumsum(means, axis=0)
    assert np.abs(missing).max() <= largest / (250 if size == 2 else 120)
    assert np.abs(residuals).max() <= largest * (size + 2) / 250
    # Without feedback, errors of this size would add up.
    assert np.abs(means[0] - givens[0].mean(0)).max() > largest / 2000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WITH_FEEDBACK)
@pytest.mark.quick_rows(4)
def test_means_and_residuals_add_up_to_the_gradients(ranks, size: int, name: str):
    """The sum of all means plus the mean residual is the sum of the mean gradients."""
    means, residuals = all_averaged(ranks(size), name, 40)
    givens = given_to(size, 40)
    largest = max(np.abs(given).max() for given in givens)
    given = np.cumsum([given.mean(0) for given in givens], axis=0)
    sent = np.cumsum(means, axis=0)
    assert np.abs(sent + residuals.mean(1) - given).max() <= largest * 40 * ROUNDING


@pytest.mark.parametrize("size", [2, 3])
def test_powersgd_is_one_step_of_power_iteration(ranks, size: int):
    """For the first matrix: P = orthonormal(mean(M) Q), and the mean is P P' mean(M), with M = gradient + residual.

    Q is not known to the test, so it checks that the mean is a projection of mean(M) to `rank` dimensions.
    """
    means, residuals = all_averaged(ranks(size), "powersgd", 12)
    rows, columns = SHAPES[0]
    for step, given in enumerate(given_to(size, 12)):
        matrix = given.mean(0)[: rows * columns].reshape(rows, columns)
        sent = means[step][: rows * columns].reshape(rows, columns)
        if step < 2:
            np.testing.assert_allclose(sent, matrix, atol=ROUNDING)
            continue
        before = residuals[step - 1].mean(0)[: rows * columns].reshape(rows, columns)
        basis = np.linalg.svd(sent)[0][:, :2]
        assert np.linalg.matrix_rank(sent, tol=1e-4) == 2
        np.testing.assert_allclose(basis @ basis.T @ (matrix + before), sent, atol=1e-4)
    bias = slice(rows * columns, rows * columns + SHAPES[1][0])
    np.testing.assert_allclose(means[5][bias], given_to(size, 12)[5].mean(0)[bias], atol=ROUNDING * 10)


def test_the_mean_residual_of_powersgd_does_not_grow(ranks):
    """That of a single replica may: it has the difference between its gradients and the mean."""
    _, residuals = all_averaged(ranks(2), "powersgd", 200)
    missing = np.linalg.norm(residuals.mean(1), axis=1)
    assert missing[100:].max() <= 1.5 * missing[10:100].max()


def overflowing(topology: Topology, name: str, bad: float, halves: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the mean of a step in which one replica overflowed, the means after it, and those without that step.

    Such steps come before DDP has rebuilt its buckets, after that, and when there are residuals. If `halves` is true,
    the loss scale is halved after each.
    """
    loss = Loss(loss_scale=16.0, may_skip=True)
    one, other = Silo(REDUCERS[name], topology, loss), Silo(REDUCERS[name], topology)
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
@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.quick_rows(6)
def test_an_overflow_is_seen_by_all_replicas(ranks, size: int, bad: float, name: str):
    """The same indices are infinite, so that all skip the step."""
    means = [mean for mean, _, _ in ranks(size).run(in_silo, overflowing, name, bad, False)]
    finite = [mean.isfinite() for mean in means]
    assert not finite[0].all()
    assert all(torch.equal(mask, finite[0]) for mask in finite)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("halves", [False, True])
def test_a_skipped_step_leaves_no_trace(ranks, size: int, halves: bool):
    """int8: to the last bit, also if DDP has rebuilt its buckets, and if the loss scale changes by a power of two."""
    for _, ours, theirs in ranks(size).run(in_silo, overflowing, "int8", float("inf"), halves):
        assert all(map(torch.equal, ours, theirs))


def powersgd_overflows(topology: Topology, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the means with overflows before and after the first compressed step, and without."""
    loss = Loss(may_skip=True)
    one, other = Silo(REDUCERS[name], topology, loss), Silo(REDUCERS[name], topology)
    ours, theirs = [], []
    for step, given in enumerate(decreed(topology.replica, 9)):
        ours.append(one.step(given))
        theirs.append(other.step(given))
        if step in (3, 6):
            one.step([tensor * float("nan") for tensor in given])
            one.gradients.rollback()
    return ours, theirs


def test_powersgd_resumes_after_a_skipped_step(ranks):
    for ours, theirs in ranks(2).run(in_silo, powersgd_overflows, "powersgd"):
        assert all(map(torch.equal, ours, theirs))


def resumed(topology: Topology, name: str, saved_after: int, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Return the means of a state that is saved and loaded into a new reducer, and the uninterrupted ones."""
    givens = decreed(topology.replica, 8)
    one = Silo(REDUCERS[name], topology)
    for given in givens[:saved_after]:
        one.step(given)
    state = one.saved(folder / f"{topology.rank}", f"replica-{topology.replica}")
    two = Silo(REDUCERS[name], topology)
    two.step([tensor * 0 for tensor in givens[0]])  # as a resumed run does, so that DDP rebuilds its buckets
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
@pytest.mark.parametrize("name", WITH_FEEDBACK)
@pytest.mark.quick_rows(5)
def test_a_resumed_state_has_the_same_bits(ranks, name: str, size: int, saved_after: int, tmp_path: Path):
    """It is saved before or after DDP has rebuilt its buckets; loaded tensors are not modified."""
    for ours, theirs in ranks(size).run(in_silo, resumed, name, saved_after, tmp_path):
        assert all(map(torch.equal, ours, theirs))


def states_after(topology: Topology, name: str, steps: int) -> dict[str, Any]:
    silo = Silo(REDUCERS[name], topology)
    for given in decreed(topology.replica, steps):
        silo.step(given)
    return copies(silo.gradients.state_dict())


@pytest.mark.parametrize("name", WITH_FEEDBACK)
def test_the_mean_residual_is_the_same_for_other_replicas(ranks, name: str):
    """Of three saved states, any number of replicas gets the mean."""
    states = ranks(3).run(in_silo, states_after, name, 6)
    kind = "residuals" if name == "int8" else "errors"
    one = REDUCERS[name].reshard(states)
    for key, mean in one[kind].items():
        torch.testing.assert_close(mean, sum(state[kind][key] for state in states) / 3)
    rest = {key: value for key, value in one.items() if key != kind}
    assert_same_tree(rest, {key: states[1][key] for key in rest})


@pytest.mark.parametrize("block", [0, -8, 12, 1])
def test_a_block_that_is_no_multiple_of_8_is_refused(block: int):
    with pytest.raises(ValueError, match=f"gradient_compression.block={block}\n  valid: a multiple of 8"):
        Int8Reducer(block=block)


def test_powersgd_names_all_values_that_are_too_small():
    with pytest.raises(ValueError, match=r"gradient_compression\.rank=0\n.*\ngradient_compression\.start=1\n"):
        PowerSGDReducer(rank=0, start=1)


# Bytes


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        (FullPrecisionReducer(), 4 * 600 + 4 * 20),
        (HalfPrecisionReducer(), 2 * 620),
        (Int8Reducer(block=104), 620 + 4 * 6),
        (PowerSGDReducer(rank=3), 4 * 3 * (20 + 30) + 4 * 20),
        (PowerSGDReducer(rank=6), 4 * 620),
    ],
    ids=["fp32", "bf16", "int8", "powersgd", "powersgd that would not save half"],
)
def test_the_size_of_a_matrix_of_20_times_30_and_a_vector_of_20(reducer: GradientReducer, expected: int):
    """Six blocks with a scale each; thin matrices of 20 and 30 rows, and the vector uncompressed."""
    assert reducer.encoded_size([torch.zeros(20, 30), torch.zeros(20)]) == expected


def numbers_sent(topology: Topology) -> tuple[int, int]:
    """Return the bytes of the second compressed step as counted by torch's hook, in float32, and as expected."""
    reducer = PowerSGDReducer(rank=1, start=2)
    silo = Silo(reducer, topology)
    counted = []
    for given in decreed(topology.replica, 4):
        silo.step(given)
        counted.append(silo.gradients.hook.total_numel_after_compression)  # pyright: ignore
    return 4 * (counted[3] - counted[2]), reducer.encoded_size([torch.zeros(shape) for shape in SHAPES])


def test_the_size_of_thin_matrices_is_what_the_hook_counts(ranks):
    for counted, expected in ranks(2).run(in_silo, numbers_sent):
        assert counted == expected < 4 * sum(torch.zeros(shape).numel() for shape in SHAPES)
