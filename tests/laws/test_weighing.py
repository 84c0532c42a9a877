"""Weights of examples and classes: steps equal those of a handwritten loop, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor
from torch.nn import functional as F

from tests.laws.cases import SIZES, Only, assert_close, assert_same, figures, tiny_data, tiny_model, train
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_tasks import choices_of
from tests.support.runs import make_clients
from trainer.data import DataSplits, ExampleWeights, TensorSource
from trainer.data.loading.class_weights import apply_class_weights
from trainer.loop.options import RoundOptions
from trainer.tasks import Classification, LanguageModelling, MultiLabel, Task
from trainer.utils.seeding import generator

EXAMPLES = sum(SIZES)
SGD = partial(torch.optim.SGD, lr=0.1)


def drawn() -> Tensor:
    """Return a weight for every example, some of them 0."""
    weights = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(0)) * 3
    weights[::7] = 0
    return weights


def weights_of(examples: Tensor) -> ExampleWeights:
    return ExampleWeights(examples, tuple(part.double().sum().item() for part in examples.split(SIZES)))


def losses_of(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss of each example [B]."""
    if isinstance(task, Classification):
        return lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")
    if isinstance(task, MultiLabel):
        return lambda outputs, targets: F.binary_cross_entropy_with_logits(
            outputs, targets.double(), reduction="none"
        ).mean(1)
    return lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none").mean(1)


def by_hand(choices: dict[str, Any], weights: Tensor, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the weights after a step w -= lr grad(sum_i w_i l_i / sum_i w_i) for each batch."""
    module = choices.get("module", tiny_model().double())
    inputs, targets = choices["data"].train.fetch(torch.arange(EXAMPLES))
    optimizer = SGD(module.parameters())
    for batch in batches:
        losses = losses_of(choices["task"])(module(inputs[batch]), targets[batch])
        ((weights[batch] * losses).sum() / weights[batch].double().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


@pytest.mark.parametrize("kind", ["many_classes", "multi_label", "regression"])
def test_steps_are_those_of_a_loop_by_hand(ranks, kind: str) -> None:
    """Two epochs of ragged batches, on 1 rank and on 3 that divide them into micro-batches."""
    choices, weights = choices_of(kind), drawn()
    orders = [torch.randperm(EXAMPLES, generator=generator(0, "order", 0, epoch)) for epoch in range(2)]
    expected = by_hand(choices_of(kind), weights, [batch for order in orders for batch in order.split(7)])
    choices |= {"weights": weights_of(weights), "batch_size": 7, "optimizer": SGD}
    alone = ranks(1).run(train, "sync", 1, choices)[0]
    apart = ranks(3).run(train, "sync", 1, choices | {"micro_batch_size": 1})[0]
    for found in (alone, apart):
        assert_close(found.model, expected, 1e-10)
    for ours, theirs in zip(apart.rounds, alone.rounds, strict=True):
        assert_close(figures(ours), figures(theirs), 1e-9)


def test_a_language_model_counts_the_tokens_of_a_window_alike() -> None:
    """sum_i w_i sum_t l_it is divided by the sum of the weights of all tokens, T sum_i w_i."""
    outputs, weights = torch.randn(3, 5, 7, dtype=torch.float64), torch.tensor([0.5, 0.0, 2.0])
    targets = torch.randint(0, 7, (3, 5))
    each = [F.cross_entropy(outputs[i], targets[i], reduction="sum") for i in range(3)]
    expected = 0.5 * each[0] + 2 * each[2]
    assert torch.allclose(LanguageModelling().loss_sum(outputs, targets, weights), expected)


def test_clients_count_by_the_weights_of_their_examples(ranks) -> None:
    """One full-batch step of each client, combined, is a step on all examples: n_k is the sum of weights."""
    weights, data = drawn(), tiny_data(EXAMPLES)
    expected = by_hand({"task": Classification(), "data": data}, weights, [torch.arange(EXAMPLES)])
    choices = {"weights": weights_of(weights), "rounds": 1}
    assert_close(ranks(2).run(train, "fedsgd", 2, choices)[0].model, expected, 1e-12)
    unweighted = ranks(2).run(train, "fedsgd", 2, {"rounds": 1})[0].model
    assert any(not torch.allclose(unweighted[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.parametrize("name", ["sync", "fedavg_adam", "scaffold", "fednova"])
def test_weights_of_1_change_no_bit(ranks, name: str) -> None:
    ones = ranks(2).run(train, name, 2, {"weights": weights_of(torch.ones(EXAMPLES))})[0]
    none = ranks(2).run(train, name, 2, {})[0]
    assert_same(ones.model, none.model)
    for ours, theirs in zip(ones.rounds, none.rounds, strict=True):
        assert_same(figures(ours), figures(theirs))


@pytest.mark.parametrize("name", ["sync", "scaffold"])
def test_a_run_resumes_in_the_middle_of_a_round(ranks, name: str, tmp_path: Path) -> None:
    choices = {"weights": weights_of(drawn()), "round": RoundOptions(steps=3)}
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, 2)})


def test_a_batch_that_weighs_nothing_has_no_gradient(ranks) -> None:
    weights = torch.zeros(EXAMPLES)
    weights[0] = 1
    found = ranks(1).run(train, "sync", 1, {"weights": weights_of(weights), "batch_size": 1, "optimizer": SGD})[0]
    assert all(torch.isfinite(tensor).all() for tensor in found.model.values())
    first = [torch.tensor([0]), torch.tensor([0])]  # once in each of two epochs
    expected = by_hand({"task": Classification(), "data": tiny_data(EXAMPLES)}, torch.ones(EXAMPLES), first)
    assert_close(found.model, expected, 1e-12)


def weighed(
    class_weights: Any, labels: np.ndarray, weights: np.ndarray | None = None, validation: float = 0
) -> ExampleWeights:
    """Return the weights of examples with these labels, those of two clients."""
    source = TensorSource(torch.zeros(len(labels), 2), torch.from_numpy(labels))
    splits = DataSplits(source, source, 4, weights=weights)
    clients = make_clients([len(labels) // 2, len(labels) - len(labels) // 2]).split_validation(validation, 0)
    found = apply_class_weights(Classification(class_weights), splits, clients)
    assert found is not None
    return found


def test_balanced_weights_equal_those_of_scikit_learn() -> None:
    """They are over the labels that occur; an example has weight 1 on average."""
    labels = np.array([0, 0, 0, 0, 0, 2, 2, 3] * 5)
    found = weighed("balanced", labels)
    np.testing.assert_allclose(found.examples, compute_sample_weight("balanced", labels), rtol=1e-6)
    assert sum(found.clients) == pytest.approx(40, rel=1e-6)
    assert weighed("balanced", labels, validation=0.5).clients != found.clients


def test_weights_of_examples_and_of_classes_are_multiplied() -> None:
    labels, own = np.array([0, 1, 2, 3, 1, 1]), np.array([1, 2, 0.5, 1, 0, 4], np.float32)
    found = weighed([1, 10, 4, 0], labels, own)
    assert found.examples.tolist() == [1, 20, 2, 0, 0, 40]
    assert found.clients == (23.0, 40.0)


@pytest.mark.parametrize(
    ("class_weights", "labels", "message"),
    [
        ([1, 2], [0, 1, 2, 3], "2 weights for 4 classes"),
        ([1, 1, 0, 0], [0, 1, 2, 3], "the training examples of 1 clients all weigh 0: 1"),
        ([0, 1, 1, 1], [0.5, 1.0, 0.0, 0.0], "this data has no labels"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(class_weights: Any, labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighed(class_weights, np.array(labels))


@pytest.mark.parametrize("class_weights", [[1, -1], [float("nan"), 1], [0, 0]])
def test_class_weights_are_finite_numbers_from_0(class_weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"task\.class_weights=.*\n.*finite numbers from 0"):
        Classification(class_weights)


class Bare:
    """A task that does not support weights."""

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()


def test_a_task_that_takes_no_weights_is_refused() -> None:
    data = tiny_data(4)
    splits = DataSplits(data.train, data.test, 3, weights=np.array([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="task=Bare takes no weights"):
        apply_class_weights(Bare(), splits, make_clients([4]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fedavg", "fedavg_adam", "scaffold"])
def test_a_client_without_weight_changes_nothing(ranks, name: str) -> None:
    """The model is finite, and that of a round without the client, whose examples all weigh 0."""
    weights = drawn()
    weights[SIZES[0] : SIZES[0] + SIZES[1]] = 0
    choices = {"weights": weights_of(weights), "rounds": 1}
    without = choices | {"client_sampling": Only(((0, 2, 3, 4, 5, 6),))}
    ours, theirs = (ranks(2).run(train, name, 2, chosen)[0] for chosen in (choices, without))
    assert_close(ours.model, theirs.model, 1e-12)
