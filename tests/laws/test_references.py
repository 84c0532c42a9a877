"""Whole runs against numpy: a linear softmax model, trained by federated averaging with every server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.laws.cases import CLASSES, FEATURES, SIZES, TEST_EXAMPLES, tiny_data, train
from trainer.algorithms import FedAvg
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.silos import SiloSpec
from trainer.loop.options import ClipOptions, RoundOptions
from trainer.optim.schedules import Cosine
from trainer.utils.seeding import generator

ROUNDS, EPOCHS, BATCH_SIZE, RATE = 5, 2, 4, 0.2
STEPS, CLIP_NORM = 3, 0.5
EDGES = np.cumsum([0, *SIZES])


def linear_model() -> nn.Module:
    """Return the softmax model, with an initial value that is not 0."""
    model = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, FEATURES * CLASSES).view(CLASSES, FEATURES))
        model.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return model


def start() -> np.ndarray:
    """Return the model's weights and biases as one array [classes, features + 1]."""
    model = linear_model()
    weight, bias = (tensor.detach().numpy() for tensor in model.parameters())
    return np.hstack([weight, bias[:, None]])


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Return all training inputs with a 1 appended, and their targets."""
    inputs, targets = tiny_data(sum(SIZES)).train.fetch(torch.arange(sum(SIZES)))
    return np.hstack([inputs.numpy(), np.ones((len(inputs), 1))]), targets.numpy()


def loss_and_gradient(weights: np.ndarray, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean cross-entropy of softmax(inputs weights^T), and its gradient (p - onehot)^T inputs / n."""
    logits = inputs @ weights.T
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    rows = np.arange(len(targets))
    loss = -np.log(chances[rows, targets]).mean()
    chances[rows, targets] -= 1
    return loss, chances.T @ inputs / len(targets)


def trained(weights: np.ndarray, client: int, round: int) -> np.ndarray:
    """Return the client's weights after its epochs of SGD in this round."""
    inputs, targets = (array[EDGES[client] : EDGES[client + 1]] for array in examples())
    for epoch in range(round * EPOCHS, (round + 1) * EPOCHS):
        order = torch.randperm(len(targets), generator=generator(0, "order", client, epoch)).numpy()
        for first in range(0, len(order), BATCH_SIZE):
            batch = order[first : first + BATCH_SIZE]
            weights = weights - RATE * loss_and_gradient(weights, inputs[batch], targets[batch])[1]
    return weights


Server = Iterator[np.ndarray]


def sgd(weights: np.ndarray, lr: float, momentum: float = 0.0, nesterov: bool = False):
    """Yield the weights after each mean delta sent: b <- momentum b + d; w <- w - lr (d + momentum b, or b)."""
    velocity = np.zeros_like(weights)
    while True:
        delta = yield weights
        velocity = momentum * velocity + delta
        weights = weights - lr * (delta + momentum * velocity if nesterov else velocity)


def adam(weights: np.ndarray, lr: float, beta1: float, beta2: float, eps: float):
    """Yield the weights after each mean delta sent: Kingma and Ba 2015, algorithm 1, with bias correction."""
    first = second = np.zeros_like(weights)
    for step in range(1, ROUNDS + 2):
        delta = yield weights
        first = beta1 * first + (1 - beta1) * delta
        second = beta2 * second + (1 - beta2) * delta**2
        corrected = first / (1 - beta1**step), second / (1 - beta2**step)
        weights = weights - lr * corrected[0] / (np.sqrt(corrected[1]) + eps)


SERVERS: dict[str, tuple[Callable[..., Any], Callable[[np.ndarray], Any]]] = {
    "average": (partial(torch.optim.SGD, lr=1.0), partial(sgd, lr=1.0)),
    "half": (partial(torch.optim.SGD, lr=0.5), partial(sgd, lr=0.5)),
    "momentum": (partial(torch.optim.SGD, lr=1.0, momentum=0.9, fused=True), partial(sgd, lr=1.0, momentum=0.9)),
    "nesterov": (
        partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True, fused=True),
        partial(sgd, lr=0.7, momentum=0.9, nesterov=True),
    ),
    "adam": (
        partial(torch.optim.Adam, lr=0.05, betas=(0.9, 0.99), eps=1e-3),
        partial(adam, lr=0.05, beta1=0.9, beta2=0.99, eps=1e-3),
    ),
}


def reference(server: Any, weight: str = "examples") -> Iterator[tuple[np.ndarray, dict[str, float]]]:
    """Return the global weights after each round, and the metrics of the round."""
    weights = next(server)
    for round in range(ROUNDS):
        locals_ = np.stack([trained(weights, client, round) for client in range(len(SIZES))])
        shares = np.array(SIZES) / sum(SIZES) if weight == "examples" else np.full(len(SIZES), 1 / len(SIZES))
        deltas = weights - locals_
        delta = np.tensordot(shares, deltas, 1)
        norms = np.linalg.norm(deltas.reshape(len(SIZES), -1), axis=1)
        reported = {"delta/norm": float(np.linalg.norm(delta))}
        reported |= {f"client/{client}/delta_norm": float(norm) for client, norm in enumerate(norms)}
        weights = server.send(delta)
        yield weights, reported


def reached(model: dict[str, Any]) -> np.ndarray:
    return np.hstack([model["weight"].numpy(), model["bias"].numpy()[:, None]])


def linear_choices(server: str, weight: str = "examples") -> dict[str, Any]:
    algorithm = FedAvg(server=SERVERS[server][0], weighting=weight)  # pyright: ignore[reportArgumentType]
    choices = {"module": linear_model(), "algorithm": algorithm, "rounds": ROUNDS, "batch_size": BATCH_SIZE}
    return choices | {"optimizer": partial(torch.optim.SGD, lr=RATE), "round": RoundOptions(epochs=EPOCHS)}


def assert_is_reference(ours: Any, theirs: list[tuple[np.ndarray, dict[str, float]]]) -> None:
    np.testing.assert_allclose(reached(ours.model), theirs[-1][0], rtol=1e-12, atol=1e-13)
    for metrics, (weights, reported) in zip(ours.rounds, theirs, strict=True):
        assert {key: metrics[key] for key in reported} == pytest.approx(reported, rel=1e-10)
        test = tiny_data(sum(SIZES)).test.fetch(torch.arange(TEST_EXAMPLES))
        inputs, targets = np.hstack([test[0].numpy(), np.ones((TEST_EXAMPLES, 1))]), test[1].numpy()
        correct = ((inputs @ weights.T).argmax(1) == targets).mean()
        assert metrics["test/accuracy"] == pytest.approx(correct, rel=1e-12)
        # Evaluation is in float32, as usual for a model.
        assert metrics["test/loss"] == pytest.approx(loss_and_gradient(weights, inputs, targets)[0], rel=1e-6)


@pytest.mark.parametrize("server", SERVERS)
def test_federated_averaging_with_every_server(ranks, server: str):
    """Five rounds of two epochs: 7 clients, batches of 4 and ragged ones, weights n_k / n; 2 silos."""
    ours = ranks(2).run(train, "fedavg", 2, linear_choices(server))[0]
    assert_is_reference(ours, list(reference(SERVERS[server][1](start()))))


@pytest.mark.parametrize("silos", [[3, 1], [2, 2], 4], ids=["3+1", "2+2", "4"])
def test_silos_of_any_sizes(ranks, silos: SiloSpec):
    """The same numbers on 4 ranks: n_k counts a client's examples, whatever its silo's replicas."""
    for ours in ranks(4).run(train, "fedavg", silos, linear_choices("average")):
        assert_is_reference(ours, list(reference(SERVERS["average"][1](start()))))


def test_equal_weights(ranks):
    ours = ranks(2).run(train, "fedavg", 2, linear_choices("nesterov", "equal"))[0]
    assert_is_reference(ours, list(reference(SERVERS["nesterov"][1](start()), "equal")))


def test_sampled_clients_alone_are_averaged(ranks):
    """The result of one round is the mean, by n_k, over the clients with metrics; the others do not move it."""
    ours = ranks(2).run(
        train, "fedavg", 2, linear_choices("average") | {"client_sampling": UniformSampler(3), "rounds": 1}
    )[0]
    chosen = UniformSampler(3).sample(len(SIZES), 0, 0)
    assert len(chosen) == 3
    assert {f"client/{client}/train_loss" for client in chosen} == {
        name for name in ours.rounds[0] if name.endswith("train_loss")
    }
    sizes = np.array([SIZES[client] for client in chosen])
    mean = np.tensordot(sizes / sizes.sum(), np.stack([trained(start(), client, 0) for client in chosen]), 1)
    np.testing.assert_allclose(reached(ours.model), mean, rtol=1e-12, atol=1e-13)


def clipped_and_scheduled(weights: np.ndarray, client: int, round: int) -> tuple[np.ndarray, float, float]:
    """Return the client's weights after a round's steps, and the last step's rate and gradient norm before clipping.

    The gradient g of the batch becomes g min(1, c / |g|), and the rate 0.2 (1 + cos(pi t)) / 2 at progress t.
    """
    inputs, targets = (array[EDGES[client] : EDGES[client + 1]] for array in examples())
    orders = [torch.randperm(len(targets), generator=generator(0, "order", client, epoch)) for epoch in range(8)]
    batches = [batch.numpy() for order in orders for batch in order.split(BATCH_SIZE)]
    norm = rate = 0.0
    for step in range(STEPS):
        batch = batches[round * STEPS + step]
        gradient = loss_and_gradient(weights, inputs[batch], targets[batch])[1]
        norm = float(np.linalg.norm(gradient))
        rate = RATE * (1 + np.cos(np.pi * (round + step / STEPS) / 2)) / 2
        weights = weights - rate * gradient * min(1, CLIP_NORM / (norm + 1e-6))
    return weights, rate, norm


@pytest.mark.parametrize("silos", [4, [3, 1]], ids=["4", "3+1"])
def test_clipping_and_schedules(ranks, silos: SiloSpec):
    """Two rounds of 3 steps. The gradient of the silo's batch is clipped, not that of a replica's part."""
    choices = linear_choices("average") | {"rounds": 2, "round": RoundOptions(steps=STEPS)}
    choices |= {"clip": ClipOptions(CLIP_NORM), "schedule": Cosine()}
    ours = ranks(4).run(train, "fedavg", silos, choices)[0]
    weights, shares = start(), np.array(SIZES) / sum(SIZES)
    for round, metrics in enumerate(ours.rounds):
        locals_, rates, norms = zip(*(clipped_and_scheduled(weights, c, round) for c in range(len(SIZES))), strict=True)
        assert max(norms) > CLIP_NORM
        weights = np.tensordot(shares, np.stack(locals_), 1)
        assert metrics["train/learning_rate"] == pytest.approx(np.mean(rates), rel=1e-12)
        assert metrics["train/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-10)
    np.testing.assert_allclose(reached(ours.model), weights, rtol=1e-11, atol=1e-12)


def test_losses_of_a_round_are_those_met_on_the_way(ranks):
    """train/loss is the mean over the examples of a round, each with the weights of its step.

    So is that of each client.
    """
    ours = ranks(2).run(train, "fedavg", 2, linear_choices("average") | {"rounds": 1})[0].rounds[0]
    inputs, targets = examples()
    sums = np.zeros(len(SIZES))
    for client in range(len(SIZES)):
        weights, first = start(), EDGES[client]
        for epoch in range(EPOCHS):
            order = torch.randperm(SIZES[client], generator=generator(0, "order", client, epoch)).numpy()
            for place in range(0, len(order), BATCH_SIZE):
                batch = first + order[place : place + BATCH_SIZE]
                loss, gradient = loss_and_gradient(weights, inputs[batch], targets[batch])
                sums[client] += loss * len(batch)
                weights = weights - RATE * gradient
        assert ours[f"client/{client}/train_loss"] == pytest.approx(sums[client] / (EPOCHS * SIZES[client]), rel=1e-12)
    assert ours["train/loss"] == pytest.approx(sums.sum() / (EPOCHS * sum(SIZES)), rel=1e-12)
