"""Data sets that are read in order: the same numbered examples on any ranks, after any restart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset

from tests.laws.cases import SIZES, assert_close, figures, tiny_data, train
from tests.laws.test_midround import assert_left_and_bit_equal
from trainer.data import DataSplits, IterableSource, PerClientSource, TensorSource, as_source, is_sequential
from trainer.data.loading.loader import BatchShard, ClientBatches
from trainer.loop.options import RoundOptions

DOCS = Path(__file__).parents[2] / "docs/data.md"
EXAMPLES = sum(SIZES)


class Recorded(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set that records the start of each read, and the number of examples read."""

    def __init__(self, source: TensorSource):
        self.source, self.starts, self.read = source, list[int](), 0

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.examples(0)

    def examples(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.starts.append(start)
        for number in range(start, len(self)):
            self.read += 1
            yield self.source.inputs[number], self.source.targets[number]


class Short(Recorded):
    """A data set whose length exceeds its number of examples."""

    def __len__(self) -> int:
        return len(self.source) + 5

    def examples(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.source.inputs[start:], self.source.targets[start:], strict=True)


class Sizeless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return self.examples(0)

    def examples(self, start: int) -> Iterator[int]:
        yield start


NONE = torch.empty(0, 6)  # of a replica that has another's example in its place


def tape() -> Recorded:
    data = tiny_data(EXAMPLES)
    assert isinstance(data.train, TensorSource)
    return Recorded(data.train)


def choices() -> dict[str, Any]:
    return {"data": DataSplits(tape(), tiny_data(EXAMPLES).test, 3), "round": RoundOptions(steps=5)}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, EXAMPLES - 1), max_size=9), max_size=5))
def test_any_examples_are_those_of_their_numbers(asked: list[list[int]]) -> None:
    source, arrays = as_source(tape()), tiny_data(EXAMPLES).train
    for ids in asked:
        some = torch.tensor(ids, dtype=torch.int64)
        assert all(map(torch.equal, source.fetch(some), arrays.fetch(some)))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_epoch_reads_once_and_replicas_share_it_in_its_order(replicas: int) -> None:
    """The replicas' parts of the batches, one after the other, are the examples from first to last."""
    seen: list[list[Tensor]] = []
    for replica in range(replicas):
        dataset = tape()
        source = IterableSource(dataset)
        share = BatchShard(replica, replicas)
        ids = torch.arange(EXAMPLES).numpy()
        stream = ClientBatches(
            lambda wanted, at=source: (at.fetch(some) for some, _ in wanted),
            ids,
            0,
            5,
            share,
            0,
            is_sequential=is_sequential(source),
        )
        batches = stream.batches(0, stream.steps_per_epoch)
        seen.append([batch.micro_batches[0][0] if batch.replica_weight else NONE for batch in batches])
        assert dataset.read <= EXAMPLES and dataset.starts == dataset.starts[:1]
    together = torch.cat([part for batch in zip(*seen, strict=True) for part in batch])
    assert torch.equal(together, tape().source.inputs)


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_replicas_train_as_one(ranks, name: str) -> None:
    alone, *others = (ranks(size).run(train, name, 1, choices())[0] for size in (1, 2))
    for other in others:
        assert_close(other.model, alone.model, 1e-10)
        for ours, theirs in zip(other.rounds, alone.rounds, strict=True):
            assert_close(figures(ours), figures(theirs), 1e-9)


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_a_run_resumes_in_the_middle_of_a_round(ranks, name: str, tmp_path: Path) -> None:
    assert_left_and_bit_equal(ranks(2), name, 2, choices(), tmp_path, {0: (0, 2)})


def test_a_data_set_that_ends_early_is_named() -> None:
    short = IterableSource(Short(tape().source))
    short.fetch(torch.arange(EXAMPLES))
    with pytest.raises(ValueError, match=re.escape(f"ended before example {EXAMPLES}, and its length is")):
        short.fetch(torch.tensor([EXAMPLES]))


def test_an_iterable_without_numbers_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"got Sizeless(.|\n)*needs __len__\(\) and examples\(start\)"):
        as_source(Sizeless())  # type: ignore[arg-type]


def test_files_of_clients_are_read_in_order_too() -> None:
    files = {client: IterableSource(tape()) for client in range(2)}
    source = PerClientSource([EXAMPLES, EXAMPLES], files, [0, 0], [0, 0])
    assert is_sequential(source) and not is_sequential(tiny_data(4).train)


def test_the_documentations_example_is_one(tmp_path: Path) -> None:
    (code,) = [
        part for part in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "class Lines" in part
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    (tmp_path / "points.txt").write_text("".join(f"{i} {i * i} {i % 2}\n" for i in range(10)))
    splits = names["load"](str(tmp_path / "points.txt"), 10, str(tmp_path / "points.txt"), 10)
    inputs, targets = splits.train.fetch(torch.tensor([3, 4, 9, 2]))
    assert inputs.tolist() == [[3, 9], [4, 16], [9, 81], [2, 4]] and targets.tolist() == [1, 0, 1, 0]
