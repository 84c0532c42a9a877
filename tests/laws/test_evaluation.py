"""Metrics are those of the evaluated models: each client is evaluated on the model that it would use."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.laws.cases import (
    CASES,
    CLASSES,
    SIZES,
    TEST_EXAMPLES,
    Records,
    case_run,
    every_client,
    silos_of,
    tiny_data,
    tiny_model,
    train,
)
from trainer.algorithms import FedAvg
from trainer.data import Clients, DataSplits
from trainer.data.transforms import Batch, Compose
from trainer.data.transforms.base import Examples
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit


def fit_to_the_end(name: str, silos: SiloSpec, choices: dict[str, Any]) -> Records:
    with distributed(silos_of(name, silos)) as topology:
        records = Records()
        fit(case_run(topology, name, choices), [records])
        return records


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(8)
def test_the_confusion_matrix_is_of_the_same_models_as_the_accuracy(ranks, name: str):
    """Its rows sum to the test examples of each label, and its diagonal to the correct ones."""
    labels = tiny_data(sum(SIZES)).test.labels
    assert labels is not None
    for records in ranks(2).run(fit_to_the_end, name, 2, {}):
        confusion = records.exhibits.confusion
        assert confusion is not None and records.result is not None
        assert confusion.sum(1).tolist() == np.bincount(labels).tolist()
        right = confusion.diag().sum().item() / TEST_EXAMPLES
        assert records.result["test/accuracy"] == pytest.approx(right)


def accuracy_by_hand(parameters: torch.Tensor, ids: np.ndarray) -> float:
    """Return the accuracy of a tiny model with these parameters, each at a multiple of 64 bytes of the vector."""
    model, start = tiny_model().double(), 0
    for parameter in model.parameters():
        parameter.data.copy_(parameters[start : start + parameter.numel()].view_as(parameter))
        start += -(-parameter.numel() // 8) * 8
    inputs, targets = tiny_data(sum(SIZES)).test.fetch(torch.from_numpy(ids))
    return model(inputs).argmax(1).eq(targets).double().mean().item()


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
def test_clients_that_train_alone_are_judged_by_their_own_models(ranks, silos: SiloSpec):
    """Seven models are evaluated on their clients' test examples; the pooled accuracy is the mean over the examples."""
    outcomes = ranks(2 if silos == 2 else 4).run(train, "local", silos, {"rounds": 4})
    kept, metrics = every_client(outcomes), outcomes[0].rounds[-1]
    right = 0.0
    for client in range(len(SIZES)):
        ids = np.arange(client, TEST_EXAMPLES, len(SIZES))
        accuracy = accuracy_by_hand(kept[client]["personal/parameters"], ids)
        assert metrics[f"client/{client}/test_accuracy"] == pytest.approx(accuracy)
        right += accuracy * len(ids)
    assert metrics["test/accuracy"] == pytest.approx(right / TEST_EXAMPLES)
    assert len({metrics[f"client/{client}/test_accuracy"] for client in range(len(SIZES))}) > 1


def test_a_personal_layer_is_the_clients_and_the_rest_is_shared(ranks):
    """With a personal output layer, 2 silos and 4 have the same metrics for every client."""
    algorithm = FedAvg(server=partial(torch.optim.SGD, lr=1.0), shared_params=r"^0\.")
    two, four = (ranks(n).run(train, "fedavg", n, {"algorithm": algorithm})[0].rounds[-1] for n in (2, 4))
    reported = [key for key in two if key.startswith("client/") or key.startswith("test/")]
    assert {key: four[key] for key in reported} == pytest.approx({key: two[key] for key in reported}, rel=1e-9)


class Zeros:
    """A transform that calls itself random, and leaves nothing of the inputs."""

    is_random = True

    def __call__(self, batch: Batch) -> Examples:
        return torch.zeros_like(batch.inputs), batch.targets

    def mismatch(self, inputs: torch.Tensor, targets: torch.Tensor, classes: int | None) -> str:
        return ""


def test_a_validation_set_of_its_own_is_evaluated_without_random_transforms(ranks):
    """Every example counts once, on any number of silos."""
    data = tiny_data(sum(SIZES))
    own = DataSplits(data.train, data.train, CLASSES, validation=data.test)
    validation = tuple(np.arange(client, TEST_EXAMPLES, len(SIZES)) for client in range(len(SIZES)))
    edges = np.cumsum([0, *SIZES])
    ids = tuple(np.arange(a, b) for a, b in pairwise(edges))
    choices = {
        "data": own,
        "clients": Clients(ids, validation, ids),
        "rounds": 1,
        "transforms": Compose({"it": Zeros()}),
    }
    for outcome in (ranks(2).run(train, "fedavg", silos, choices)[0] for silos in (1, 2)):
        model = tiny_model().double()
        model.load_state_dict(outcome.model)
        inputs, targets = data.test.fetch(torch.arange(TEST_EXAMPLES))
        outputs, metrics = model(inputs), outcome.rounds[0]
        assert metrics["validation/accuracy"] == pytest.approx(outputs.argmax(1).eq(targets).double().mean().item())
        loss = torch.nn.functional.cross_entropy(outputs, targets).item()
        assert metrics["validation/loss"] == pytest.approx(loss, rel=1e-6)


def test_validation_is_of_the_clients_own_held_out_examples(ranks):
    """Held-out examples are those of the training source; each is evaluated once, and none is trained on."""
    edges = np.cumsum([0, *SIZES])
    ids = [np.arange(a, b) for a, b in pairwise(edges)]
    test = tuple(np.arange(client, TEST_EXAMPLES, len(SIZES)) for client in range(len(SIZES)))
    clients = Clients(tuple(mine[1:] for mine in ids), tuple(mine[:1] for mine in ids), test)
    outcome = ranks(2).run(train, "fedavg", 2, {"clients": clients, "rounds": 1})[0]
    model = tiny_model().double()
    model.load_state_dict(outcome.model)
    inputs, targets = tiny_data(sum(SIZES)).train.fetch(torch.from_numpy(edges[:-1]))
    outputs = model(inputs)
    metrics = outcome.rounds[0]
    assert metrics["validation/accuracy"] == pytest.approx(outputs.argmax(1).eq(targets).double().mean().item())
    loss = torch.nn.functional.cross_entropy(outputs, targets).item()
    assert metrics["validation/loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["round/examples"] == sum(SIZES) - len(SIZES)
