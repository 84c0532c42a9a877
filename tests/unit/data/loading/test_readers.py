"""Workers of torch's DataLoader read what the rank itself would read, and end with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from trainer.data import DataSplits, MapDatasetSource, Padding, Source, TensorSource, as_source
from trainer.data.loading.readers import LoadingOptions, Reader, WorkerReader, check_loading
from trainer.utils.errors import InputError
from trainer.utils.user_code import user_location

EXAMPLES = 24
CPU = torch.device("cpu")
REQUESTS = [
    (torch.tensor(ids), seed) for ids, seed in (([3, 1, 2], 5), ([0], 6), (list(range(EXAMPLES)), 5), ([7, 23], 8))
]


class Drawing(Dataset[tuple[Tensor, int]]):
    """An item is its number, a draw of each of the three generators, and the process that has read it."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 13:
            raise KeyError(f"row {index}")
        draws = [torch.rand(()).item(), np.random.random_sample(), random.random()]
        return torch.tensor([index, *draws], dtype=torch.float64), os.getpid()


class InOrder(IterableDataset[Any]):
    def __len__(self) -> int:
        return EXAMPLES

    def __iter__(self) -> Iterator[Any]:
        return self.examples(0)

    def examples(self, start: int) -> Iterator[Any]:
        return ((torch.tensor([number, random.random()]), number) for number in range(start, EXAMPLES))


class Ragged(Dataset[Any]):
    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"tokens": torch.arange(index + 1)}, index


class Holder(Drawing):
    """A data set that holds what cannot be sent to another process."""

    def __init__(self) -> None:
        self.key = lambda row: row


SOURCES: dict[str, Source] = {
    "drawing": as_source(Drawing()),
    "in order": as_source(InOrder()),
    "ragged": MapDatasetSource(Ragged(), collate_fn=Padding({"tokens": 0})),
    "memory": TensorSource(torch.arange(EXAMPLES), torch.arange(EXAMPLES)),
}


@pytest.fixture(scope="module")
def reader() -> Iterator[WorkerReader]:
    made = WorkerReader(list(SOURCES.values()), LoadingOptions(workers=2), CPU)
    yield made
    workers = workers_of(made)
    made.close()
    assert not any(map(is_alive, workers))


def workers_of(reader: WorkerReader) -> list[int]:
    return [worker.pid for worker in reader.iterator._workers]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def readable(name: str) -> list[tuple[Tensor, int]]:
    return [(ids[ids != 13], seed) for ids, seed in REQUESTS] if name == "drawing" else REQUESTS


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", SOURCES)
def test_workers_read_the_same_bits_in_the_same_order(reader: WorkerReader, name: str, is_split: bool) -> None:
    source, requests = SOURCES[name], readable(name)
    ours = list(reader.read(source, requests, is_split))
    theirs = list(Reader().read(source, requests))
    assert len(ours) == len(requests)
    for (inputs, targets), (expected, numbers) in zip(ours, theirs, strict=True):
        if name == "ragged":
            assert list(inputs) == ["tokens", "attention_mask"]
            inputs, expected = inputs["tokens"], expected["tokens"]
        assert torch.equal(inputs, expected)
        if name == "drawing":
            assert set(targets.tolist()) <= set(workers_of(reader))
        else:
            assert torch.equal(targets, numbers)


def test_a_request_that_is_split_goes_to_all_workers(reader: WorkerReader) -> None:
    (_, whole), (_, split) = (
        next(reader.read(SOURCES["drawing"], [(torch.arange(12), 0)], is_split)) for is_split in (False, True)
    )
    assert len(set(whole.tolist())) == 1 and len(set(split.tolist())) == 2


def test_what_was_asked_for_and_is_not_wanted_is_forgotten(reader: WorkerReader) -> None:
    source = SOURCES["drawing"]
    first = next(reader.read(source, readable("drawing") * 5))
    second = next(reader.read(source, [(torch.tensor([9]), 0)]))
    assert len(first[0]) == 3 and second[0][0, 0] == 9


def test_the_default_generator_is_left_alone(reader: WorkerReader) -> None:
    before = torch.default_generator.get_state()
    list(reader.read(SOURCES["drawing"], [(torch.tensor([1]), 0)]))
    assert torch.equal(torch.default_generator.get_state(), before)


def test_an_error_has_its_type_and_the_line_of_the_users_code(reader: WorkerReader) -> None:
    with pytest.raises(KeyError, match="row 13") as caught:
        list(reader.read(SOURCES["drawing"], [(torch.tensor([13]), 0)]))
    assert "test_readers.py, line " in user_location(caught.value) and "in __getitem__" in user_location(caught.value)
    assert "raise KeyError" in str(caught.value.__cause__)


def test_stop_signals_are_not_for_workers(reader: WorkerReader) -> None:
    list(reader.read(SOURCES["drawing"], [(torch.tensor([1]), 0)]))
    for pid in workers_of(reader):
        os.kill(pid, signal.SIGTERM), os.kill(pid, signal.SIGINT), os.kill(pid, signal.SIGUSR1)
    assert list(reader.read(SOURCES["drawing"], [(torch.tensor([1]), 0)]))


def test_a_worker_that_dies_is_named() -> None:
    reader = WorkerReader([SOURCES["drawing"]], LoadingOptions(workers=1), CPU)
    results = reader.read(SOURCES["drawing"], [(torch.tensor([number]), 0) for number in range(12)])
    next(results)
    os.kill(workers_of(reader)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"data.workers=1: a worker that reads the data has died(.|\n)*lower"):
        list(results)
    reader.close()


def test_a_dataset_that_cannot_be_sent_is_refused() -> None:
    source = as_source(Holder())
    reader = WorkerReader([source], LoadingOptions(workers=1), CPU)
    with pytest.raises(InputError, match=r"data.workers=1: Holder cannot be sent to another process: .*lambda"):
        next(reader.read(source, [(torch.tensor([1]), 0)]))


def test_workers_without_work_are_refused() -> None:
    splits = DataSplits(SOURCES["memory"], SOURCES["memory"], None)
    with pytest.raises(ValueError, match=r"data.workers=3, but the examples are in memory \(TensorSource\)"):
        check_loading((splits.train, splits.test), LoadingOptions(workers=3))
    check_loading((splits.train, SOURCES["drawing"]), LoadingOptions(workers=3))


SCRIPT = """
import sys, time
import torch
from tests.unit.data.loading.test_readers import CPU, SOURCES, LoadingOptions, WorkerReader, workers_of

if __name__ == "__main__":
    reader = WorkerReader(list(SOURCES.values()), LoadingOptions(workers=2), CPU)
    next(reader.read(SOURCES["drawing"], [(torch.tensor([1]), 0)] * 9))
    print(*workers_of(reader), flush=True)
    time.sleep({seconds})
"""


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0, 600], ids=["ends", "is killed"])
def test_workers_end_with_their_rank(seconds: int) -> None:
    command = [sys.executable, "-c", SCRIPT.format(seconds=seconds)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    ) as rank:
        assert rank.stdout
        workers = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        if seconds:
            rank.kill()
        rank.wait(60)
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
