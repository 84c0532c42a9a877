"""Distillation: the loss by hand, the teacher in training alone, and the laws of every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.laws.cases import (
    CLASSES,
    FEATURES,
    SIZES,
    Outcome,
    Records,
    assert_close,
    assert_same,
    case_run,
    figures,
    tiny_data,
    tiny_model,
    train,
)
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.support.runs import SGD, make_clients
from trainer.checkpoint import Checkpointer
from trainer.data.loading.class_weights import apply_class_weights
from trainer.data.transforms import Compose, ComposeForTeacher, MixUp, Normalise
from trainer.distributed.topology import distributed
from trainer.loop.checkpointing import validate_resume
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.tasks import Classification, Distillation

EXAMPLES = sum(SIZES)


@dataclass
class Linear:
    """A teacher whose answers are the first features, times a factor; it keeps the numbers of rows that it has seen."""

    factor: float = 3.0
    seen: list[int] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return str(self.factor)

    def __call__(self, inputs: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(len(inputs))
        return self.factor * inputs[:, :CLASSES]


def taught(weight: float = 0.7, temperature: float = 2.0, **choices: Any) -> dict[str, Any]:
    """Return the choices of a run with a teacher."""
    transforms = {"shift": Normalise(0.1, 1.5), "mixup": MixUp()}
    return {
        "task": Distillation(Linear(), temperature, weight),
        "transforms": ComposeForTeacher(transforms, CLASSES),
        **choices,
    }


def plain(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of the same run without a teacher."""
    chain = choices["transforms"]
    return {**choices, "task": Classification(), "transforms": Compose(chain.transforms, chain.classes)}


def labels_and_logits(soft: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a student's outputs, labels or probabilities, a teacher's inputs, and weights of 5 examples."""
    generator = torch.Generator().manual_seed(3)
    outputs, inputs = torch.randn(2, 5, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (5,), generator=generator)
    mixed = F.softmax(torch.randn(5, CLASSES, generator=generator, dtype=torch.float64), 1)
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    return outputs[:, :CLASSES].clone().requires_grad_(), mixed if soft else labels, inputs, weights


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixtures"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_loss_and_gradient_by_hand(temperature: float, soft: bool):
    """The gradient is (1 - w) (q - y) + w T (q_T - p_T) of each example, times its weight."""
    outputs, targets, inputs, weights = labels_and_logits(soft)
    teacher, share = Linear(), 0.3
    loss = Distillation(teacher, temperature, share).loss_sum(outputs, (targets, inputs), weights)
    loss.backward()
    logits = teacher.factor * inputs[:, :CLASSES]
    probabilities = targets if soft else F.one_hot(targets, CLASSES).double()
    once, ours, theirs = outputs.softmax(1), (outputs / temperature).softmax(1), (logits / temperature).softmax(1)
    of_labels = -(probabilities * once.log()).sum(1)
    of_teacher = temperature**2 * (theirs * (theirs.log() - ours.log())).sum(1)
    expected = weights @ ((1 - share) * of_labels + share * of_teacher)
    gradient = weights[:, None] * ((1 - share) * (once - probabilities) + share * temperature * (ours - theirs))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, gradient, rtol=1e-12, atol=1e-12)


def test_equal_weights_are_none():
    outputs, targets, inputs, _ = labels_and_logits(soft=False)
    task = Distillation(Linear())
    of_ones = task.loss_sum(outputs, (targets, inputs), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(task.loss_sum(outputs, (targets, inputs)), of_ones, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_weight_zero_is_classification(ranks, name: str):
    """Bit for bit, in weights and figures."""
    choices = taught(weight=0.0)
    for ours, theirs in zip(*(ranks(2).run(train, name, 2, each) for each in (choices, plain(choices))), strict=True):
        assert_same_outcome(ours, theirs)


def assert_same_outcome(ours: Outcome, theirs: Outcome) -> None:
    assert_same(ours.model, theirs.model)
    for our_round, their_round in zip(ours.rounds, theirs.rounds, strict=True):
        assert_same(figures(our_round), figures(their_round))


def test_the_teacher_changes_training_and_not_the_figures_of_evaluation(ranks):
    """A teacher that knows more than the labels of 8 examples helps; losses of evaluation are those of labels."""
    choices = {"sizes": [8], "rounds": 1}
    (alone,) = ranks(1).run(train, "sync", 1, plain(taught(**choices)))
    (helped,) = ranks(1).run(train, "sync", 1, taught(**choices))
    assert alone.rounds[0]["train/loss"] != helped.rounds[0]["train/loss"]
    module = tiny_model().double()
    module.load_state_dict(helped.model)
    inputs, targets = tiny_data(8).test.fetch(torch.arange(21))
    outputs = module((inputs - 0.1) / 1.5)
    expected = {
        "loss": F.cross_entropy(outputs, targets).item(),
        "accuracy": outputs.argmax(1).eq(targets).double().mean(),
    }
    assert_close({name: helped.rounds[0][f"test/{name}"] for name in expected}, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_replicas_is_one(ranks, size: int):
    """With micro-batches, too."""
    (alone,) = ranks(1).run(train, "sync", 1, taught())
    for together in ranks(size).run(train, "sync", 1, taught(micro_batch_size=1)):
        assert_close(together.model, alone.model)


def test_federated_with_one_client_is_sync(ranks):
    choices = taught(sizes=[EXAMPLES], optimizer=SGD)
    (federated,), (sync,) = (ranks(1).run(train, name, 1, choices) for name in ("fedavg", "sync"))
    assert_close(federated.model, sync.model)


def test_it_resumes_with_the_same_bits(ranks, tmp_path: Path):
    """Silo 0 stops in the middle of a client."""
    choices = taught(micro_batch_size=3, round=RoundOptions(steps=4))
    assert_left_and_bit_equal(ranks(2), "fedavg_adam", 2, choices, tmp_path, {0: (0, 3)})


def counted() -> tuple[list[int], int]:
    """Return the rows that a teacher has seen in a round of one epoch with an evaluation, and after the evaluation."""
    teacher = Linear()
    with distributed(1, device="cpu") as topology:
        choices = taught(task=Distillation(teacher), rounds=1, batch_size=8, micro_batch_size=3)
        fit(case_run(topology, "sync", choices))
    return teacher.seen, EXAMPLES


def test_the_teacher_answers_once_for_each_example_of_training_in_its_micro_batch(ranks):
    ((seen, examples),) = ranks(1).run(counted)
    assert seen == [3, 3, 2] * (examples // 8)


def test_both_see_the_same_mixture():
    """The teacher sees it without the student's normalization."""
    source = tiny_data(20).train
    ids = torch.arange(20)
    request = (source, ids[:5], ids, 1, 2, torch.device("cpu"))
    transforms = {"shift": Normalise(0.1, 1.5), "mixup": MixUp()}
    inputs, (labels, seen) = ComposeForTeacher(transforms, CLASSES).for_training(*request)
    expected_inputs, expected_labels = Compose(transforms, CLASSES).for_training(*request)
    assert torch.equal(inputs, expected_inputs)
    assert torch.equal(labels, expected_labels)
    torch.testing.assert_close((seen - 0.1) / 1.5, inputs, rtol=1e-12, atol=1e-12)


def class_weighted(weight: float) -> dict[str, Any]:
    with distributed(1, device="cpu") as topology:
        task = Distillation(Linear(), weight=weight, class_weights="balanced")
        data, clients = tiny_data(EXAMPLES), make_clients(SIZES, 21)
        weights = apply_class_weights(task, data, clients)
        run = case_run(topology, "sync", taught(task=task, weights=weights, batch_size="all", rounds=1))
        records = Records()
        fit(run, [records])
        assert weights is not None
        return {"loss": records.rounds[0]["train/loss"], "weights": weights.examples}


def test_class_weights_weigh_both_terms(ranks):
    """The loss of the first batch, of all examples, is the weighted mean of those by hand."""
    ((first,), (second,)) = (ranks(1).run(class_weighted, weight) for weight in (0.0, 1.0))
    source = tiny_data(EXAMPLES).train
    ids = torch.arange(EXAMPLES)
    chain = taught()["transforms"]
    inputs, targets = chain.for_training(source, ids, ids, 0, 0, torch.device("cpu"))
    outputs = tiny_model().double()(inputs)
    for share, found in ((0.0, first), (1.0, second)):
        weights = found["weights"]
        expected = Distillation(Linear(), weight=share).loss_sum(outputs, targets, weights) / weights.sum()
        assert_close({"loss": found["loss"]}, {"loss": expected.item()}, 1e-6)


def resumed_with(teacher: Linear, folder: Path) -> str:
    with distributed(1, device="cpu") as topology:
        run = case_run(topology, "sync", taught(task=Distillation(teacher), rounds=2))
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        start = checkpoints.latest()
        try:
            validate_resume(run, start, checkpoints.storage)
        except ValueError as error:
            return str(error)
        fit(run, [], checkpoints, start, until=1 if start is None else None)
        return ""


def test_another_teacher_is_refused(ranks, tmp_path: Path):
    assert ranks(1).run(resumed_with, Linear(3.0), tmp_path) == [""]
    (message,) = ranks(1).run(resumed_with, Linear(4.0), tmp_path)
    assert "the teacher has changed" in message
    assert ranks(1).run(resumed_with, Linear(3.0), tmp_path) == [""]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": 0.0}, "task.temperature=0"),
        ({"temperature": float("inf")}, "task.temperature=inf"),
        ({"weight": -0.1, "temperature": -1.0}, "task.weight=-0.1"),
        ({"weight": 1.5}, "task.weight=1.5\n  valid: from 0 to 1"),
    ],
)
def test_wrong_numbers(wrong: dict[str, Any], says: str):
    with pytest.raises(ValueError, match="valid") as refusal:
        Distillation(Linear(), **wrong)
    assert says in str(refusal.value)
