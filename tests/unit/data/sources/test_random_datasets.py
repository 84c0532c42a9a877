"""Datasets that draw random numbers: a draw belongs to the seed and the example, not to who reads it with what."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from trainer.data import PerClientSource, Source, TensorSource, as_source
from trainer.data.sources.base import fetch_seeded
from trainer.data.transforms import Compose
from trainer.utils.seeding import draw_from_generators, seed_generators, separate_generators

EXAMPLES = 12
CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.randn(()).item(),
    "numpy": np.random.standard_normal,
    "random": random.random,
    "all": lambda: torch.rand(()).item() + np.random.random() + random.random(),
}


class Noisy(Dataset[tuple[Tensor, int]]):
    """Item i is its number with a random one, of which every third example draws none."""

    def __init__(self, draw: Callable[[], float], examples: int = EXAMPLES):
        self.draw, self.examples = draw, examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, self.draw() if index % 3 else 0.0], dtype=torch.float64), index


class NoisyStream(IterableDataset[Any]):
    """The same, in order."""

    def __init__(self, draw: Callable[[], float]):
        self.items = Noisy(draw)

    def __len__(self) -> int:
        return EXAMPLES

    def __iter__(self) -> Iterator[Any]:
        return self.examples(0)

    def examples(self, start: int) -> Iterator[Any]:
        return (self.items[number] for number in range(start, EXAMPLES))


def map_style(draw: Callable[[], float]) -> Dataset[Any]:
    return Noisy(draw)


def subset(draw: Callable[[], float]) -> Dataset[Any]:
    """A part of a data set, as of random_split: it is read by `__getitems__`."""
    return Subset(Noisy(draw, 2 * EXAMPLES), range(EXAMPLES))


MAKERS = {"map": map_style, "subset": subset, "stream": NoisyStream}


def draws(source: Source, ids: list[int], *tags: int) -> list[float]:
    """Return what each of the examples has drawn."""
    inputs, targets = fetch_seeded(source, torch.tensor(ids, dtype=torch.int64), *tags)
    assert inputs[:, 0].tolist() == targets.tolist() == ids
    return inputs[:, 1].tolist()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@settings(deadline=None, max_examples=10)
@given(parts=st.lists(st.lists(st.integers(0, EXAMPLES - 1), max_size=8), max_size=5))
def test_an_example_draws_the_same_with_any_others(make: Any, draw: Any, parts: list[list[int]]) -> None:
    """A source that has read nothing, another rank's or a restarted one, gives the bits of one that has read all."""
    all_at_once = draws(as_source(make(draw)), [*range(EXAMPLES)], 5)
    source = as_source(make(draw))
    for ids in parts:
        assert draws(source, ids, 5) == [all_at_once[number] for number in ids]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_examples_and_epochs_draw_different_numbers(make: Any, draw: Any) -> None:
    source, random_ids = as_source(make(draw)), [number for number in range(EXAMPLES) if number % 3]
    seen = [draws(source, random_ids, seed, epoch) for seed in (0, 1) for epoch in range(3)]
    assert len({number for numbers in seen for number in numbers}) == 6 * len(random_ids)


def test_the_three_generators_are_independent() -> None:
    """Numpy and torch draw the same bits from the same seed."""
    for seed in (0, 1, 7 << 32 | 7):
        with separate_generators():
            seed_generators(seed)
            assert len({round(number, 6) for number in draw_from_generators()}) == 3


@pytest.mark.parametrize("draw", [lambda: 0.0, DRAWS["all"]], ids=["none", "all"])
def test_reading_leaves_the_generators_as_they_were(draw: Callable[[], float]) -> None:
    """A model that draws from them is not affected by the data set."""
    source, states = as_source(Noisy(draw)), []
    for _ in range(2):
        torch.manual_seed(3), np.random.seed(4), random.seed(5)
        if states:
            draws(source, [1, 2, 3])
        states.append([torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)])
    assert states[0] == states[1]


def test_a_data_set_that_draws_nothing_is_read_a_batch_at_a_time_and_once() -> None:
    read: list[int] = []

    class Counting(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            read.append(index)
            return super().__getitem__(index)

    draws(as_source(Counting(lambda: 0.0)), [3, 1, 2])
    assert read == [3, 1, 2]


def test_training_draws_by_seed_and_epoch_and_evaluation_always_the_same() -> None:
    source, ids, compose = as_source(Noisy(DRAWS["all"])), torch.arange(EXAMPLES), Compose()
    trained = [
        compose.for_training(source, ids, ids, seed, epoch, CPU)[0] for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2]) and not torch.equal(trained[0], trained[3])
    assert torch.equal(source.fetch(ids)[0], source.fetch(ids)[0])


def test_files_of_clients_draw_alike_in_any_silo() -> None:
    """Client 1's examples have the same draws where client 0's file is and where it is not; the clients' differ."""
    sources = {client: as_source(Noisy(DRAWS["torch"])) for client in (0, 1)}
    together = PerClientSource([EXAMPLES] * 2, sources, [0, 0], [0, 0])
    alone = PerClientSource([EXAMPLES] * 2, {1: sources[1]}, [0, 1], [0, 0])
    first, second = (fetch_seeded(together, torch.from_numpy(together.ids(client)), 9)[0] for client in (0, 1))
    assert torch.equal(second, fetch_seeded(alone, torch.from_numpy(alone.ids(1)), 9)[0])
    assert not torch.equal(first, second)


def test_sources_in_memory_are_fetched_as_ever() -> None:
    source = TensorSource(torch.zeros(3, 1), torch.arange(3))
    assert fetch_seeded(source, torch.tensor([2, 0]), 1)[1].tolist() == [2, 0]
