"""BatchNorm's running statistics after a round are those of all replicas and silos, pooled; ragged data can be trained.

The first layer normalises the inputs, so its statistics depend only on the data and the order, and numpy can compute
them.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.laws.cases import SIZES, assert_same, case_run, leaves, silos_of, tiny_data, train
from trainer.algorithms import FedAvg
from trainer.checkpoint import Checkpointer
from trainer.data import DataSplits, TensorSource
from trainer.distributed.silos import SiloSpec, silo_sizes
from trainer.distributed.topology import distributed
from trainer.loop.assignment import assign_clients
from trainer.loop.fit import fit
from trainer.utils.seeding import generator

BATCH_SIZE, MOMENTUM = 8, 0.1
BIG = [4 * size for size in SIZES]
EDGES = np.cumsum([0, *BIG])


def norm_first(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model that normalises its inputs, then classifies them."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)


def norm_choices(**choices: Any) -> dict[str, Any]:
    return {"module": norm_first(), "sizes": BIG, "data": tiny_data(sum(BIG)), "batch_size": BATCH_SIZE} | choices


Statistics = tuple[np.ndarray, np.ndarray, int]


def batches(examples: int, replicas: int) -> list[tuple[int, int]]:
    """Return the bounds of batches of 8. A last one that gives a replica fewer than 2 examples joins the one before."""
    bounds = [*range(0, examples, BATCH_SIZE), examples]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < 2 * replicas:
        del bounds[-2]
    return list(pairwise(bounds))


def replica_statistics(inputs: np.ndarray, before: Statistics, replica: int, replicas: int) -> Statistics:
    """Return the statistics of a replica: r <- 0.9 r + 0.1 b over its parts of an epoch's batches.

    The variance of b is the unbiased one, as in torch.
    """
    mean, variance, count = before
    for begin, end in batches(len(inputs), replicas):
        first, last = (begin + (end - begin) * edge // replicas for edge in (replica, replica + 1))
        mean = (1 - MOMENTUM) * mean + MOMENTUM * inputs[first:last].mean(0)
        variance = (1 - MOMENTUM) * variance + MOMENTUM * inputs[first:last].var(0, ddof=1)
        count += 1
    return mean, variance, count


def pooled(parts: list[tuple[float, Statistics]]) -> Statistics:
    """Return the statistics of a mixture: mean = sum p m, variance = sum p v + sum p (m - mean)^2, largest counter."""
    shares = np.array([weight for weight, _ in parts])
    shares /= shares.sum()
    means, variances, counts = (np.stack(column) for column in zip(*(part for _, part in parts), strict=True))
    mean = shares @ means
    return mean, shares @ variances + shares @ (means - mean) ** 2, counts.max()


def expected(clients: dict[int, int], rounds: int) -> Statistics:
    """Return the global statistics after some rounds of one epoch; `clients` has the number of replicas of each."""
    inputs = tiny_data(sum(BIG)).train.fetch(torch.arange(sum(BIG)))[0].numpy()
    state: Statistics = (np.zeros(6), np.ones(6), 0)
    for epoch in range(rounds):
        parts = []
        for client, replicas in clients.items():
            order = torch.randperm(BIG[client], generator=generator(0, "order", client, epoch)).numpy()
            of_client = inputs[EDGES[client] : EDGES[client + 1]][order]
            for replica in range(replicas):
                parts.append((BIG[client] / replicas, replica_statistics(of_client, state, replica, replicas)))
        state = pooled(parts)
    return state


def replicas_by_client(silos: SiloSpec) -> dict[int, int]:
    """Return the number of replicas that train each client: that of its silo."""
    sizes = silo_sizes(silos, [0] * 4)
    return {
        c: size for size, mine in zip(sizes, assign_clients(range(len(BIG)), BIG, sizes), strict=True) for c in mine
    }


def assert_statistics(model: dict[str, Any], statistics: Statistics) -> None:
    mean, variance, count = statistics
    np.testing.assert_allclose(model["0.running_mean"], mean, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(model["0.running_var"], variance, rtol=1e-11)
    assert int(model["0.num_batches_tracked"]) == count


@pytest.mark.parametrize("silos", [4, [3, 1], [2, 2]], ids=["4", "3+1", "2+2"])
def test_statistics_are_pooled_over_replicas_and_silos(ranks, silos: SiloSpec):
    """Three rounds, each client from the pooled statistics of the round before; equal on all ranks."""
    for ours in ranks(4).run(train, "fedavg", silos, norm_choices(rounds=3)):
        assert_statistics(ours.model, expected(replicas_by_client(silos), 3))


def test_the_servers_optimizer_does_not_touch_them(ranks):
    """A server with learning rate 0 moves no parameter, and the statistics are the same as with any other."""
    still = FedAvg(server=partial(torch.optim.SGD, lr=0.0))
    ours = ranks(2).run(train, "fedavg", 2, norm_choices(rounds=2, algorithm=still))[0]
    assert_statistics(ours.model, expected(dict.fromkeys(range(len(BIG)), 1), 2))
    start = norm_first().state_dict()
    assert all(torch.equal(ours.model[name], start[name]) for name in ("0.weight", "1.weight", "1.bias"))


def of_sync(examples: int, size: int, rounds: int) -> Statistics:
    """Return the same for one silo of `size` ranks that trains examples 0 to `examples`."""
    inputs = tiny_data(sum(BIG)).train.fetch(torch.arange(examples))[0].numpy()
    state: Statistics = (np.zeros(6), np.ones(6), 0)
    for epoch in range(rounds):
        order = torch.randperm(examples, generator=generator(0, "order", 0, epoch)).numpy()
        parts = [(1.0, replica_statistics(inputs[order], state, replica, size)) for replica in range(size)]
        state = pooled(parts)
    return state


@pytest.mark.parametrize("examples", [16, 17, 19, 20, 23])
@pytest.mark.parametrize("size", [1, 2])
def test_ragged_data_can_be_trained(ranks, size: int, examples: int):
    """A replica never gets a single example, which has no variance: 17 and 19 are 2 batches, 20 and 23 are 3."""
    choices = norm_choices(sizes=[examples], rounds=2)
    ours = ranks(size).run(train, "sync", 1, choices)
    assert ours[0].rounds[0]["round/steps"] == len(batches(examples, size))
    assert ours[0].rounds[0]["round/examples"] == examples
    for one in ours:
        assert_statistics(one.model, of_sync(examples, size, 2))
        assert np.isfinite(one.rounds[-1]["train/loss"])


@pytest.mark.parametrize("micro", [2, 3])
def test_micro_batches_of_ragged_data_can_be_trained(ranks, micro: int):
    """Shares of 4 and of 5 examples in micro-batches of 2 or 3: none has a single example, and all are used."""
    choices = norm_choices(sizes=[17], rounds=2, micro_batch_size=micro)
    for ours in ranks(2).run(train, "sync", 1, choices):
        assert ours.rounds[0]["round/examples"] == 17
        assert np.isfinite(ours.rounds[-1]["train/loss"])


@pytest.mark.parametrize("sizes", [[1, 9, 12], [2, 9, 12], [3, 9, 12]], ids=["1", "2", "3"])
def test_a_client_too_small_for_its_replicas_can_be_trained(ranks, sizes: list[int]):
    """A client of 1 to 3 examples cannot give two to each of 2 replicas: it is trained, and its loss is finite."""
    (first, _) = ranks(2).run(train, "fedavg", 1, norm_choices(sizes=sizes, data=tiny_data(sum(sizes)), rounds=2))
    assert np.isfinite(first.rounds[-1]["train/loss"])
    assert all(bool(torch.isfinite(leaf).all()) for leaf in first.model.values())


def far_from_zero(name: str, silos: SiloSpec, folder: Any, until: int, resume: bool) -> dict[str, Any]:
    """Train a float32 model on inputs around 1000 with a variance of 100."""
    with distributed(silos_of(name, silos)) as topology:
        inputs, targets = tiny_data(sum(BIG), torch.float32).train.fetch(torch.arange(sum(BIG)))
        source = TensorSource(1000 + 10 * inputs, targets)
        choices = norm_choices(module=norm_first(torch.float32), data=DataSplits(source, source, 3), rounds=4)
        run = case_run(topology, name, choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        result = fit(run, (), checkpoints, checkpoints.latest() if resume else None, until=until)
        return leaves(result.model.state_dict())


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_resumed_statistics_are_bit_equal_far_from_zero(ranks, name: str, tmp_path: Path):
    """The second moment, var + mean^2, is recomputed from the saved variance, in float64 so that no bit is lost."""
    ranks(2).run(far_from_zero, name, 2, tmp_path / "parts", 2, False)
    resumed = ranks(2).run(far_from_zero, name, 2, tmp_path / "parts", 4, True)
    through = ranks(2).run(far_from_zero, name, 2, tmp_path / "one", 4, False)
    assert_same(resumed[0], through[0])


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_loading_a_finished_run_gives_its_model(ranks, name: str, tmp_path: Path):
    """A run that was stopped after its last checkpoint computes its confusion matrix from it: no step, no change."""
    trained = ranks(2).run(far_from_zero, name, 1, tmp_path, 4, False)
    for ours in ranks(2).run(far_from_zero, name, 1, tmp_path, 4, True):
        assert_same(ours, trained[0])
