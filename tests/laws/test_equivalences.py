"""Different ways to one result: equal silos are one, ranks are one process, FedAvg of one step is gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import (
    CASES,
    EXACT,
    SIZES,
    assert_close,
    every_client,
    figures,
    tiny_data,
    tiny_model,
    train,
)
from trainer.algorithms import FedAvg
from trainer.data import Clients, DataSplits, TensorSource
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.loop.options import ClipOptions, RoundOptions
from trainer.utils.seeding import generator


def whole(examples: int, clients: int) -> Clients:
    """Return clients that all hold the same `examples` examples."""
    none = tuple(np.arange(0) for _ in range(clients))
    return Clients(tuple(np.arange(examples) for _ in range(clients)), none, (np.arange(21), *none[1:]))


@pytest.mark.parametrize("name", [name for name in EXACT if name not in ("krum", "local")])
@pytest.mark.quick_rows(5)
def test_identical_silos_are_one_silo(ranks, name: str):
    """Two clients with the same examples on two silos end where one such client ends: the mean of equals is the equal.

    They take all their examples in each step, because clients have different orders. Krum needs five clients.
    """
    data = tiny_data(24)
    choices = {"data": data, "sizes": [24], "rounds": 3, "batch_size": "all", "round": RoundOptions(steps=3)}
    two = ranks(2).run(train, name, 2, choices | {"clients": whole(24, 2)})[0]
    one = ranks(1).run(train, name, 1, choices | {"clients": whole(24, 1)})[0]
    assert_close(two.model, one.model)
    assert_close(two.algorithm, one.algorithm)
    for ours, theirs in zip(two.rounds, one.rounds, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-12)
        assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-12)
        assert ours.get("delta/cosine", 1) == pytest.approx(1)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.quick_rows(4)
def test_any_number_of_processes_is_one_process(ranks, name: str):
    """With 5 of 7 clients sampled, 1, 2 and 4 silos of one rank differ only by the order of sums, in all metrics too.

    So do silos of 3 and 1 ranks, where a client's batch is divided.
    """
    clip = ClipOptions(None if name in ("scaffold", "fednova") else 1.0)  # these refuse clipping
    choices: dict[str, Any] = {"rounds": 4, "client_sampling": UniformSampler(5), "clip": clip}
    if name != "fedsgd":
        choices |= {"round": RoundOptions(steps=4)}
    one = ranks(1).run(train, name, 1, choices)
    for size, silos in ((2, 2), (4, 4), (4, [3, 1])):
        many = ranks(size).run(train, name, silos, choices)
        assert_close(many[0].model, one[0].model)
        assert_close(many[0].algorithm, one[0].algorithm)
        assert set(every_client(many)) == set(one[0].clients)
        for client, kept in every_client(many).items():
            assert_close(kept, one[0].clients[client])
        for ours, theirs in zip(many[0].rounds, one[0].rounds, strict=True):
            assert figures(ours) == pytest.approx(figures(theirs), rel=1e-9, nan_ok=True)


def combine_steps(sizes: list[int], clients: int) -> dict[str, Any]:
    """Return the choices of one SGD step a round on all examples."""
    choices = {"sizes": sizes, "data": tiny_data(sum(sizes)), "batch_size": "all", "round": RoundOptions(steps=1)}
    return choices | {"rounds": 5, "optimizer": partial(torch.optim.SGD, lr=0.5)}


@pytest.mark.parametrize("sizes", [[6, 6, 6, 6], SIZES], ids=["equal", "unequal"])
def test_fedavg_of_one_step_is_sync(ranks, sizes: list[int]):
    """Each client's gradient is the mean over its n_k examples; weighted by n_k / n they sum to the full gradient.

    mean_k (n_k / n) (w - lr g_k) = w - lr sum_k (n_k / n) g_k, which is the synchronous step on the union.
    """
    choices = combine_steps(sizes, len(sizes))
    federated = ranks(2).run(train, "fedavg", 2, choices)[0]
    synchronous = ranks(2).run(train, "sync", 1, choices)[0]
    assert_close(federated.model, synchronous.model)
    for ours, theirs in zip(federated.rounds, synchronous.rounds, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-12)
        assert ours["test/accuracy"] == theirs["test/accuracy"]


def batch_of(ids: np.ndarray, client: int, number: int, size: int) -> np.ndarray:
    """Return batch `number` of a client in the order of the loader; the batch size divides the number of examples."""
    epoch, place = divmod(number * size, len(ids))
    return ids[torch.randperm(len(ids), generator=generator(0, "order", client, epoch))[place : place + size]]


def test_fedavg_of_one_step_a_round_is_sgd_on_the_union_of_the_batches(ranks):
    """Four clients of 12 examples, batches of 4: plain torch on the 16 examples of the four clients in a round."""
    rounds, size, sizes = 7, 4, [12, 12, 12, 12]
    choices = combine_steps(sizes, len(sizes)) | {"batch_size": size, "rounds": rounds}
    ours = ranks(2).run(train, "fedavg", 2, choices)[0]
    model, data = tiny_model().double(), tiny_data(sum(sizes)).train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number in range(rounds):
        union = [batch_of(np.arange(12 * client, 12 * client + 12), client, number, size) for client in range(4)]
        inputs, targets = data.fetch(torch.from_numpy(np.concatenate(union)))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        assert ours.rounds[number]["train/loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert_close(ours.model, {name: tensor.detach() for name, tensor in model.state_dict().items()})


class Point(nn.Module):
    """A point in space; its outputs are its distances to the inputs, by coordinate."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.full((3,), 4.0, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.place - inputs


class HalfSquares:
    """A task whose loss is half the squared distance."""

    scores: tuple[str, ...] = ()
    headline = "loss"
    unit_name = "example"
    has_confusion = False

    def units(self, targets: Tensor) -> int:
        return 1

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * outputs.square().sum()

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * outputs.square().sum(1, keepdim=True)

    def summary(self, sums: Tensor, units: float) -> dict[str, float]:
        return {"loss": sums.item() / units}

    def pooled_sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {}

    def pooled_summary(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {}

    def mismatch(self, outputs: Tensor, targets: Tensor, classes: int | None) -> str:
        return ""


@pytest.mark.parametrize("name", ["fedavg", "fedavg_momentum", "fedsgd"])
@pytest.mark.quick_rows(1)
def test_quadratic_silos_reach_the_known_point(ranks, name: str):
    """With equal curvature, s steps at rate r move client k from w to c_k + (1 - r)^s (w - c_k).

    So FedAvg contracts to sum_k (n_k / n) c_k, the mean of all examples, for any s; with momentum it overshoots first.
    """
    inputs = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    source = TensorSource(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    choices: dict[str, Any] = {
        "module": Point(),
        "task": HalfSquares(),
        "data": DataSplits(source, source, None),
        "optimizer": partial(torch.optim.SGD, lr=0.3),
        "batch_size": "all",
        "rounds": 250 if name == "fedavg_momentum" else 100,
        "eval.every_rounds": 1000,
    }
    if name != "fedsgd":
        choices |= {"round": RoundOptions(steps=2)}
    reached = ranks(2).run(train, name, 2, choices)[0]
    np.testing.assert_allclose(reached.model["place"], inputs.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", ["examples", "equal"])
def test_the_weights_are_what_they_are_called(ranks, weight: Any):
    """One round of one step from w = 4: `examples` gives sum_k (n_k / n) w_k, `equal` the plain mean of w_k."""
    inputs = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    source = TensorSource(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    choices: dict[str, Any] = {
        "module": Point(),
        "task": HalfSquares(),
        "data": DataSplits(source, source, None),
        "optimizer": partial(torch.optim.SGD, lr=0.25),
        "algorithm": FedAvg(server=partial(torch.optim.SGD, lr=1.0), weighting=weight),
        "batch_size": "all",
        "rounds": 1,
    }
    edges = np.cumsum([0, *SIZES])
    means = np.stack([inputs[a:b].mean(0).numpy() for a, b in pairwise(edges)])
    locals_ = 4 - 0.25 * (4 - means)
    expected = np.average(locals_, axis=0, weights=SIZES if weight == "examples" else None)
    reached = ranks(2).run(train, "fedavg", 2, choices)[0]
    np.testing.assert_allclose(reached.model["place"], expected, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(8)
def test_every_row_learns(ranks, name: str):
    """No law holds only because nothing moves: the loss falls from round to round, by a twentieth in all."""
    rounds = ranks(2).run(train, name, 2, {"rounds": 6, "optimizer": partial(torch.optim.SGD, lr=0.1)})[0].rounds
    losses = [metrics["train/loss"] for metrics in rounds]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
