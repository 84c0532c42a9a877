"""The server optimizer equals one optimizer of the whole vector, however that is divided into parts and blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.unit.optim.test_state import Attribute, Countdown
from trainer.algorithms import FedOpt
from trainer.algorithms.server_optimizer import ServerOptimizer, extract_range, sorted_by_offset
from trainer.models import flat
from trainer.models.flat import blocks_of, difference

NUMBERS = 100
WHOLE, HALVES = [slice(0, NUMBERS)], [slice(0, 48), slice(48, NUMBERS)]
SERVERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "mean": partial(torch.optim.SGD, lr=1.0, fused=True),
    "nesterov": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "yogi": partial(FedOpt, lr=0.05, rule="yogi"),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "countdown": partial(Countdown, lr=0.5),
    "attribute": partial(Attribute, lr=0.5),
}


def numbers(seed: int) -> Tensor:
    return torch.randn(NUMBERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(server: ServerOptimizer, vector: Tensor, parts: Sequence[slice], seeds: Sequence[int]) -> None:
    for seed in seeds:
        for part in parts:
            for block in blocks_of(vector, part):
                server.step(block, numbers(seed)[block])


@pytest.mark.parametrize("blocks", [[16, 1000], [1000, 16], [16, 16], [16, 24]], ids=str)
@pytest.mark.parametrize("name", SERVERS)
def test_neither_parts_nor_blocks_show(name: str, blocks: list[int]):
    """Two steps, saved, and two more, in blocks of these lengths: the bits of torch's optimizer of the whole."""
    vector, wanted = numbers(0), numbers(0)
    with patch.object(flat, "BLOCK", blocks[0]):
        first = ServerOptimizer(SERVERS[name], vector, HALVES)
        walk(first, vector, HALVES, [1, 2])
    with patch.object(flat, "BLOCK", blocks[1]):
        second = ServerOptimizer(SERVERS[name], vector, WHOLE)
        second.load_state_dict(first.state_dict())
        walk(second, vector, WHOLE, [3, 4])
    theirs = SERVERS[name]([wanted])
    for seed in (1, 2, 3, 4):
        wanted.grad = numbers(seed)
        theirs.step()
    assert torch.equal(vector, wanted)


def test_a_state_is_cut_as_its_parts_lie():
    """It is assembled from parts in any order; missing parts are zero."""
    whole = torch.arange(1.0, 21.0)
    saved = sorted_by_offset({"12": {"sum": whole[12:17]}, "0": {"sum": whole[0:4]}, "4": {"sum": whole[4:9]}})
    lacking = whole.clone()
    lacking[9:12] = lacking[17:] = 0
    for start in range(20):
        for stop in range(start + 1, 21):
            assert torch.equal(extract_range(saved, slice(start, stop))["sum"], lacking[start:stop])


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad", "countdown", "attribute"])
def test_parts_that_moved_differently_often_stay_so(name: str):
    """One half has moved twice, the other never: after loading, each equals torch's optimizer of that half."""
    vector, wanted = numbers(0), numbers(0)
    with patch.object(flat, "BLOCK", 16):
        first, second = ServerOptimizer(SERVERS[name], vector, HALVES), ServerOptimizer(SERVERS[name], vector, HALVES)
        walk(first, vector, HALVES[:1], [1, 2])
        second.load_state_dict(first.state_dict())
        walk(second, vector, HALVES, [3])
    for half, seeds in zip(HALVES, [(1, 2, 3), (3,)], strict=True):
        theirs = SERVERS[name]([wanted[half]])
        for seed in seeds:
            part = theirs.param_groups[0]["params"][0]
            part.grad = numbers(seed)[half]
            theirs.step()
    assert torch.equal(vector, wanted)


def test_a_rank_that_moves_nothing_has_an_empty_part():
    vector, none = numbers(0), slice(0, 0)
    assert blocks_of(vector, none) == [none]
    ServerOptimizer(SERVERS["nesterov"], vector, [none]).step(none, vector[none])
    assert torch.equal(vector, numbers(0))


def test_a_difference_is_the_same_in_blocks():
    a, b = numbers(0), numbers(1)
    with patch.object(flat, "BLOCK", 16):
        delta, norm = difference(a, b, 0.5)
    assert torch.equal(delta, (a - b) * 0.5)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(a - b)), rel=1e-14)
