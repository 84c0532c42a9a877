"""The metrics of a task are those of all examples, as computed by scikit-learn, whatever rank evaluated them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

from tests.laws.cases import SIZES, TEST_EXAMPLES, assert_close, figures, tiny_model, train
from trainer.data import DataSplits, TensorSource
from trainer.tasks import Classification, MultiLabel, Regression

EXAMPLES, FEATURES = sum(SIZES), 6


def splits(targets: Tensor, inputs: Tensor, classes: int | None) -> DataSplits:
    train, test = (TensorSource(inputs[part], targets[part]) for part in (slice(EXAMPLES), slice(EXAMPLES, None)))
    return DataSplits(train, test, classes)


def made_up(outputs: int) -> tuple[Tensor, Tensor]:
    """Return random inputs, and numbers [N, outputs] that depend on them."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(EXAMPLES + TEST_EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :outputs] + 0.3 * inputs[:, -outputs:]


def model_of(outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def choices_of(kind: str) -> dict[str, Any]:
    """Return a task with data and a model for it."""
    inputs, numbers = made_up(8 if kind == "many_classes" else 3)
    if kind == "regression":
        return {"task": Regression(huber=1.0), "data": splits(numbers, inputs, None), "module": tiny_model().double()}
    if kind == "multi_label":
        return {"task": MultiLabel(), "data": splits((numbers > 0.3).float(), inputs, None)}
    if kind == "two_classes":
        data = splits((numbers[:, 0] > 0).long(), inputs, 2)
        return {"task": Classification(), "data": data, "module": model_of(2)}
    return {"task": Classification(), "data": splits(numbers.argmax(1), inputs, 8), "module": model_of(8)}


def expected(kind: str, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return scikit-learn's metrics over all test examples."""
    if kind == "regression":
        return {"mae": metrics.mean_absolute_error(targets, outputs), "r2": metrics.r2_score(targets, outputs)}
    if kind == "multi_label":
        found = {f"{kind}_f1": metrics.f1_score(targets, outputs > 0, average=kind) for kind in ("micro", "macro")}
        return found | {"auc": metrics.roc_auc_score(targets, outputs)}
    predicted = outputs.argmax(1)
    found = {
        "accuracy": metrics.accuracy_score(targets, predicted),
        "macro_f1": metrics.f1_score(targets, predicted, average="macro"),
    }
    if kind == "two_classes":
        return found | {"auc": metrics.roc_auc_score(targets, outputs[:, 1] - outputs[:, 0])}
    return found | {"top5": metrics.top_k_accuracy_score(targets, outputs, k=5, labels=range(8))}


def assert_as_expected(
    kind: str, choices: dict[str, Any], model: dict[str, Tensor], reported: dict[str, float]
) -> None:
    module = choices.get("module", tiny_model().double())
    module.load_state_dict(model)
    inputs, targets = choices["data"].test.fetch(torch.arange(TEST_EXAMPLES))
    with torch.no_grad():
        theirs = expected(kind, module(inputs).numpy(), targets.numpy())
    for name, value in theirs.items():
        assert reported[f"test/{name}"] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("kind", ["many_classes", "two_classes", "multi_label", "regression"])
def test_figures_are_those_of_all_examples_on_any_number_of_ranks(ranks, kind: str):
    """One silo of 1, 2 or 3 replicas has the same metrics; so do silos of 2 and of 1 for their models."""
    choices = choices_of(kind)
    alone, *others = (ranks(size).run(train, "sync", 1, choices)[0] for size in (1, 2, 3))
    assert_as_expected(kind, choices, alone.model, alone.rounds[-1])
    for other in others:
        for ours, theirs in zip(other.rounds, alone.rounds, strict=True):
            assert_close(figures(ours), figures(theirs), 1e-9)
    silos = ranks(3).run(train, "fedavg", [2, 1], choices)[0]
    assert_as_expected(kind, choices, silos.model, silos.rounds[-1])
