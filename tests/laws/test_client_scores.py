"""Scores of single clients that are made from pooled sums are those of scikit-learn, on any number of replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score, roc_auc_score

from tests.laws.cases import Records
from tests.support.runs import fedavg, make_clients, make_run
from trainer.data import DataSplits, TensorSource
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import MetricsOptions

SIZES, TESTS = [8, 16, 8], 60
SCORES = ("auc", "sensitivity", "calibration_error")


def data() -> DataSplits:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(sum(SIZES) + TESTS, 4, generator=generator)
    targets = (inputs[:, 0] + torch.randn(len(inputs), generator=generator) > 0.5).long()
    train, test = slice(0, sum(SIZES)), slice(sum(SIZES), None)
    return DataSplits(TensorSource(inputs[train], targets[train]), TensorSource(inputs[test], targets[test]), 2)


def run_and_predict(silos: SiloSpec) -> tuple[dict[str, Any], np.ndarray]:
    """Return the metrics of a round, and the differences of the outputs of its model for the test set."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    with distributed(silos) as topology:
        run = make_run(
            topology,
            SIZES,
            algorithm=fedavg(),
            module=module,
            data=data(),
            clients=make_clients(SIZES, TESTS),
            metrics=MetricsOptions(client_scores=SCORES),
            **{"eval.batch_size": 7},
        )
        records = Records()
        model = fit(run, [records]).model
        with torch.no_grad():
            outputs = model(data().test.fetch(torch.arange(TESTS))[0])
        return records.rounds[-1], (outputs[:, 1] - outputs[:, 0]).numpy()


@pytest.mark.parametrize("silos", [[1, 1], [2]], ids=str)
def test_scores_of_clients_are_those_of_scikit_learn(ranks, silos: SiloSpec):
    labels = data().test.labels
    assert labels is not None
    outcomes = ranks(sum(silos)).run(run_and_predict, silos)  # pyright: ignore[reportArgumentType]
    for metrics, scores in outcomes:
        for client in range(len(SIZES)):
            ids = np.arange(client, TESTS, len(SIZES))
            expected = roc_auc_score(labels[ids], scores[ids])
            assert metrics[f"client/{client}/test_auc"] == pytest.approx(expected, abs=1e-12)
            expected = recall_score(labels[ids], scores[ids] > 0)
            assert metrics[f"client/{client}/test_sensitivity"] == pytest.approx(expected)
        by_client = [metrics[f"client/{client}/test_auc"] for client in range(len(SIZES))]
        assert metrics["clients/worst_auc"] == min(by_client)
        assert metrics["clients/worst_calibration_error"] == max(
            metrics[f"client/{client}/test_calibration_error"] for client in range(len(SIZES))
        )
        assert metrics["clients/auc_std"] == pytest.approx(np.std(by_client))
