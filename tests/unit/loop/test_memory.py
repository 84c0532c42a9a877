"""Memory: without client state, an algorithm uses as much for a thousand clients as for ten, except a counter each."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.laws.cases import CASES, FEDERATED, case_run
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.topology import distributed
from trainer.loop.options import RoundOptions
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState

FEW, MANY = 10, 1000
COHORT_SIZE, CLIENT_EXAMPLES = 8, 2
COUNT_BYTES = 8  # the counter of a client's rounds

STATEFUL = [name for name in FEDERATED if CASES[name].algorithm().keeps_client_state]
STATELESS = [name for name in FEDERATED if name not in STATEFUL]


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.quick_rows(5)
def test_tensors_do_not_grow_with_the_clients(name: str):
    """They do not grow inside a round, after each step, nor after the last one, except for a counter of each client.

    Less than a byte of each is tolerated: a thread of gloo may still hold the last header.
    """
    few, many = tensor_bytes(name, FEW), tensor_bytes(name, MANY)
    assert len(few) == COHORT_SIZE + 1 and min(few) > 0
    growth = [(more - less) / (MANY - FEW) for less, more in zip(few, many, strict=True)]
    assert growth == [pytest.approx(COUNT_BYTES, abs=0.9)] * len(few)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.quick_rows(4)
def test_what_clients_keep_is_seen(name: str):
    """The same measure shows the states of a thousand clients."""
    assert tensor_bytes(name, MANY)[-1] - tensor_bytes(name, FEW)[-1] > (MANY - FEW) * COUNT_BYTES


def test_objects_do_not_grow_with_the_clients():
    """Lists, arrays and texts of Python and numpy hold little more than two numbers for each client.

    A name has 50 bytes.
    """
    tensor_bytes("fedavg", FEW)  # imports and caches are filled now
    few, many = object_bytes("fedavg", FEW), object_bytes("fedavg", MANY)
    assert 0 < many < few + 24 * (MANY - FEW)


def tensor_bytes(name: str, clients: int) -> list[int]:
    """Return the bytes of the tensors of a run: after each step of the last round, and after it.

    Clients' examples are not counted, since they exist before.
    """
    held: list[int] = []
    with open_run(name, clients) as run, only_new_objects():
        state = TrainState(run)
        for index in range(3):
            watch = (lambda *_: held.append(new_tensor_bytes())) if index == 2 else None
            train_round(state, run.sample_round(index), watch)
        held.append(new_tensor_bytes())
    return held


def object_bytes(name: str, clients: int) -> int:
    """Return the bytes that Python and numpy, not torch, hold for a run with this number of clients."""
    with open_run(name, clients) as run:
        tracemalloc.start()
        state = TrainState(run)
        for index in range(12):
            train_round(state, run.sample_round(index))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return held


@contextmanager
def open_run(name: str, clients: int) -> Iterator[Run]:
    """Return a run of an algorithm of the table, over small equal clients: a few a round, one step each."""
    choices = {
        "sizes": [CLIENT_EXAMPLES] * clients,
        "batch_size": CLIENT_EXAMPLES,
        "round": RoundOptions(steps=1),
        "client_sampling": UniformSampler(COHORT_SIZE),
    }
    with distributed() as topology:
        yield case_run(topology, name, choices)


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Hide objects that exist already from the garbage collector, until the block is left."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def new_tensor_bytes() -> int:
    """Return the bytes of all tensors that the collector knows; views of one storage count once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
