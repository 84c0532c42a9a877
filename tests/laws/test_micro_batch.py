"""The micro-batch size that `auto` finds gives the same bits as if it were set; if nothing fits, the error says so."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.laws.cases import Records, assert_same, case_run, leaves, silos_of, tiny_model
from tests.laws.test_resume import noisy_choices, round_checkpoint, text_choices, timeless
from trainer.checkpoint import Checkpointer
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.micro_batch_size import max_replica_batch_size, optimizer_numbers_per_parameter
from trainer.optim import GroupedOptimizerFactory, Muon
from trainer.utils.oom import OutOfMemoryError, raise_if_oom

ROUNDS = 3
GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.00 GiB of which 1.00 GiB is"
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."


class Narrow(nn.Module):
    """A module that fits a limited number of examples in training, by rank."""

    def __init__(self, inner: nn.Module, limits: list[int]):
        super().__init__()
        self.inner, self.limits = inner, limits

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and len(inputs) > self.limits[dist.get_rank() % len(self.limits)]:
            raise torch.OutOfMemoryError(GPU)
        return self.inner(inputs)


class Crumbling(nn.Module):
    """A module that fits 9 examples in training, but only 4 after a larger number was tried."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.limit = inner, 9

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and len(inputs) > self.limit:
            self.limit = 4
            raise torch.OutOfMemoryError(GPU)
        return self.inner(inputs)


def run_to(name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, until: int, limits: list[int]) -> Records:
    """Train to this round from the newest checkpoint."""
    with distributed(silos_of(name, silos)) as topology:
        narrow = {"module": Narrow(choices["module"], limits), "rounds": ROUNDS}
        run, records = case_run(topology, name, choices | narrow), Records()
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        fit(run, [records], checkpoints, checkpoints.latest(), until=until)
        return records


def assert_found(
    pool: Any, name: str, silos: SiloSpec, choices: dict[str, Any], limits: list[int], size: int, folder: Path
) -> None:
    """Assert that `auto`, in two parts, equals `size` set by hand; the second part has enough memory."""
    auto, by_hand = choices | {"micro_batch_size": "auto"}, choices | {"micro_batch_size": size}
    pool.run(run_to, name, silos, auto, folder / "auto", 1, limits)
    found = pool.run(run_to, name, silos, auto, folder / "auto", ROUNDS, [99])[0]
    given = pool.run(run_to, name, silos, by_hand, folder / "hand", ROUNDS, [99])[0]
    ours, theirs = round_checkpoint(folder / "auto", ROUNDS), round_checkpoint(folder / "hand", ROUNDS)
    for section in ("model", "algorithm", "clients"):
        assert_same(leaves(ours.load(section)), leaves(theirs.load(section)))
    for mine, yours in zip(found.rounds, given.rounds[1:], strict=True):
        assert mine.pop("micro_batch_size") == size
        assert_same(timeless(mine), timeless(yours))


@pytest.mark.parametrize(
    ("limits", "size"), [([3, 99], 2), ([99, 4], 4), ([99, 99], 5), ([99, 5], 5)], ids=["2", "4", "share", "just"]
)
def test_sync_takes_the_largest_that_all_ranks_have_room_for(ranks, limits: list[int], size: int, tmp_path: Path):
    """The model has dropout and batch statistics; each of two replicas has 5 of a batch of 10."""
    assert_found(ranks(2), "sync", 1, noisy_choices("sync"), limits, size, tmp_path)


@pytest.mark.parametrize("name", ["fedavg", "diloco", "fedsgd"])
def test_silos_take_the_same(ranks, name: str, tmp_path: Path):
    assert_found(ranks(2), name, 2, noisy_choices(name), [99, 6], 4, tmp_path)


@pytest.mark.parametrize(("limit", "size"), [(8, 4), (9, 8)])
def test_an_eighth_is_left_to_spare(ranks, limit: int, size: int, tmp_path: Path):
    assert_found(ranks(2), "fedavg", 2, noisy_choices("fedavg"), [99, limit], size, tmp_path)


def test_what_fits_no_longer_after_a_failure_is_not_taken(ranks, tmp_path: Path):
    choices = noisy_choices("fedavg")
    broken_up = choices | {"module": Crumbling(choices["module"])}
    assert_found(ranks(2), "fedavg", 2, broken_up, [99], 4, tmp_path)


def test_buckets_stay_in_their_order_on_three_replicas(ranks, tmp_path: Path):
    choices = text_choices(0.2) | {"batch_size": 9}
    assert_found(ranks(3), "sync", 1, choices, [99, 2, 3], 2, tmp_path)


def test_a_whole_share_that_fits_does_not_limit_a_larger_one(ranks, tmp_path: Path):
    """Silos of 3 replicas and of 1, whose shares of 12 are 4 and 12."""
    choices = noisy_choices("fedavg") | {"batch_size": 12}
    assert_found(ranks(4), "fedavg", [3, 1], choices, [4, 4, 4, 9], 8, tmp_path)


def test_a_number_given_later_takes_the_place_of_the_one_found(ranks, tmp_path: Path):
    choices = noisy_choices("fedavg")
    for until, size in ((1, "auto"), (2, 5), (3, "auto")):
        given = choices | {"micro_batch_size": size}
        records = ranks(2).run(run_to, "fedavg", 2, given, tmp_path, until, [3, 99] if until == 1 else [99])[0]
        assert records.rounds[0].get("micro_batch_size") == {1: 2, 2: None, 3: 10}[until]


def no_room_at_all(folder: Path) -> str:
    with pytest.raises(OutOfMemoryError) as failure:
        run_to("fedavg", 2, {"module": tiny_model().double(), "micro_batch_size": "auto"}, folder, 1, [99, 0])
    return str(failure.value)


def test_all_ranks_end_when_one_has_no_room_for_an_example(ranks, tmp_path: Path):
    assert all("micro_batch_size=auto" in message for message in ranks(2).run(no_room_at_all, tmp_path))


@pytest.mark.parametrize(("batch_size", "share"), [(4, 4), (10, 10), ("all", 20)])
def test_the_share_is_that_of_the_largest_batch(batch_size: int | str, share: int):
    with distributed() as topology:
        run = case_run(topology, "fedavg", {"batch_size": batch_size})
        assert max_replica_batch_size(run) == share


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (GroupedOptimizerFactory(partial(torch.optim.AdamW, lr=0.1), True, (("^0", 2.0),)), 2),
        (partial(Muon, lr=0.1), 1),
    ],
    ids=["sgd", "momentum", "adamw", "muon"],
)
def test_what_an_optimizer_keeps_is_counted(make: Any, numbers: int):
    with distributed() as topology:
        assert optimizer_numbers_per_parameter(case_run(topology, "fedavg", {"optimizer": make})) == numbers


SAID = {
    "a GPU's": (torch.OutOfMemoryError(GPU), 64, ["=null", "64 examples", "allocate 2.50 GiB", "=32 or less", "=auto"]),
    "a CPU's": (RuntimeError(CPU), 100, ["100 examples", "allocate 99 bytes", "micro_batch_size=32 or less"]),
    "a library's": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 3, ["3 examples", "=1 or less"]),
    "Python's": (MemoryError(), 1, ["1 examples", "a smaller model"]),
}


@pytest.mark.parametrize(("error", "examples", "message"), SAID.values(), ids=SAID.keys())
def test_what_there_is_no_room_for_is_said(error: Any, examples: int, message: list[str]):
    with pytest.raises(OutOfMemoryError) as failure:
        raise_if_oom(error, "micro_batch_size", None, examples)
    assert all(part in str(failure.value) for part in message), str(failure.value)


def test_other_errors_are_left_alone():
    """The caller raises them again."""
    error = RuntimeError("shapes cannot be multiplied")
    try:
        raise_if_oom(error, "micro_batch_size", 4, 4)
    except OutOfMemoryError:
        pytest.fail("taken for a lack of memory")
    assert error.__cause__ is None


# A process with 640 MB more memory than PyTorch takes, for a model whose examples take at least 4 MB each.
LITTLE = """
import resource, sys
import torch
from torch import nn
sys.path.insert(0, {root!r})
from tests.laws.cases import case_run, tiny_data
from tests.support.runs import make_clients
from trainer.utils.oom import OutOfMemoryError
from trainer.loop.fit import fit
from trainer.distributed.topology import distributed

torch.set_num_threads(1)
wide = nn.Sequential(nn.Linear(6, 1 << 18), nn.Tanh(), nn.Linear(1 << 18, 3))
choices = dict(sizes=[512], module=wide, data=tiny_data(512, torch.float32), batch_size=512, rounds=1)
choices |= {{"clients": make_clients([512], 21), "eval.batch_size": 4}}
with distributed() as topology:
    fit(case_run(topology, "sync", choices | dict(batch_size=2)))  # what PyTorch needs at the first use
    pages = int(open("/proc/self/statm").read().split()[0])
    room = pages * resource.getpagesize() + (640 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    # First what must work: a failed allocation leaves a heap behind that is broken up.
    result = fit(case_run(topology, "sync", choices | dict(micro_batch_size="auto")))
    print(result.metrics["micro_batch_size"])
    try:
        fit(case_run(topology, "sync", choices))
    except OutOfMemoryError as error:
        print(error)
"""


@pytest.mark.long
def test_real_memory_is_found_and_its_end_is_said():
    """When allocations fail, `auto` trains with fewer of 512 examples at a time; all of them at once do not fit."""
    script = LITTLE.format(root=str(Path(__file__).parents[2]))
    # Each further arena of glibc reserves 64 MB of addresses at unpredictable moments.
    settings = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, env=settings)
    assert ended.returncode == 0, ended.stderr
    found, message, way_out = ended.stdout.splitlines()
    assert "micro_batch_size=null" in message and "512 examples" in message and "could not allocate" in message
    assert "set micro_batch_size=256 or less, or micro_batch_size=auto" in way_out
    assert int(found) in (16, 32, 64, 128)
