"""The server optimizer: however its vector is cut into parts and blocks, it is one optimizer of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from trainer import flat
from trainer.algorithms import FedOpt
from trainer.algorithms.server import Server, cut, in_order
from trainer.flat import blocks_of, difference

NUMBERS = 100
WHOLE, HALVES = [slice(0, NUMBERS)], [slice(0, 48), slice(48, NUMBERS)]
SERVERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "mean": partial(torch.optim.SGD, lr=1.0, fused=True),
    "nesterov": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "yogi": partial(FedOpt, lr=0.05, rule="yogi"),
}


def numbers(seed: int) -> Tensor:
    return torch.randn(NUMBERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walk(server: Server, vector: Tensor, parts: Sequence[slice], seeds: Sequence[int]) -> None:
    for seed in seeds:
        for part in parts:
            for block in blocks_of(vector, part):
                server.step(block, numbers(seed)[block])


@pytest.mark.parametrize("name", SERVERS)
def test_neither_parts_nor_blocks_show(name: str):
    """Two steps in blocks of 16, saved, and two in one block of all: the bits of torch's optimizer of the whole."""
    vector, wanted = numbers(0), numbers(0)
    with patch.object(flat, "BLOCK", 16):
        assert [len(blocks_of(vector, part)) for part in HALVES] == [3, 4]
        first = Server(SERVERS[name], vector, HALVES)
        walk(first, vector, HALVES, [1, 2])
    second = Server(SERVERS[name], vector, WHOLE)
    second.load_state_dict(first.state_dict())
    walk(second, vector, WHOLE, [3, 4])
    theirs = SERVERS[name]([wanted])
    for seed in (1, 2, 3, 4):
        wanted.grad = numbers(seed)
        theirs.step()
    assert torch.equal(vector, wanted)


def test_a_state_is_cut_as_its_parts_lie():
    """Out of parts in any order, of some of the vector: what is between them and behind them is zero."""
    whole = torch.arange(1.0, 21.0)
    saved = in_order({"12": {"sum": whole[12:17]}, "0": {"sum": whole[0:4]}, "4": {"sum": whole[4:9]}})
    lacking = whole.clone()
    lacking[9:12] = lacking[17:] = 0
    for start in range(20):
        for stop in range(start + 1, 21):
            assert torch.equal(cut(saved, slice(start, stop))["sum"], lacking[start:stop])


def test_a_rank_that_moves_nothing_has_an_empty_part():
    vector, none = numbers(0), slice(0, 0)
    assert blocks_of(vector, none) == [none]
    Server(SERVERS["nesterov"], vector, [none]).step(none, vector[none])
    assert torch.equal(vector, numbers(0))


def test_a_difference_is_the_same_in_blocks():
    a, b = numbers(0), numbers(1)
    with patch.object(flat, "BLOCK", 16):
        delta, norm = difference(a, b, 0.5)
    assert torch.equal(delta, (a - b) * 0.5)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(a - b)), rel=1e-14)
