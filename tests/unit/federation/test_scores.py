"""Scores that are made of pooled sums are right over sites: those of scikit-learn, and of one silo with all clients."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.laws.cases import Records
from tests.laws.test_client_scores import SCORES, SIZES, TESTS, data
from tests.support.runs import fedavg, make_clients, make_run
from tests.unit.federation.test_exchange import Hall, Hosts
from trainer.data.transforms import Compose, Standardise
from trainer.distributed.topology import distributed
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.registry import Registry
from trainer.federation.spool import Spool
from trainer.loop.fit import fit
from trainer.loop.options import MetricsOptions

NAMES = [f"site-{client}" for client in range(len(SIZES))]


def scored_run(topology, **choices):
    torch.manual_seed(0)
    return make_run(
        topology,
        SIZES,
        algorithm=fedavg(),
        module=torch.nn.Linear(4, 2),
        data=data(),
        clients=make_clients(SIZES, TESTS),
        transforms=Compose({"standardise": Standardise()}),
        metrics=MetricsOptions(client_scores=SCORES),
        **choices,
    )


def fitted(run, make_exchange=None):
    """Return the metrics of the last round, the model, the confusion matrix, and what the transforms have measured."""
    records, states = Records(), []
    result = fit(run, [records], on_start=states.append, **({"make_exchange": make_exchange} if make_exchange else {}))
    statistics = states[0].trainer.transforms.state_dict()
    return records.rounds[-1], result.model, records.exhibits.confusion, statistics


def over_sites(folder):
    registry, results = Registry(Spool(folder), NAMES), {}
    makers = [partial(SiteExchange, Hall(registry, name), name) for name in NAMES]
    makers.append(partial(CoordinatorExchange, Hosts(registry)))
    with distributed(device="cpu") as topology:
        initial = scored_run(topology).make_model()

        def work(silo, make_exchange):
            place = replace(topology, silo=silo, silo_sizes=(1,) * len(makers))
            run = scored_run(place)
            homes = tuple(range(len(SIZES)))
            run = replace(run, model=lambda: deepcopy(initial), clients=replace(run.clients, homes=homes))
            run.data.has_central = True
            run.data.central = run.data.test if silo == len(SIZES) else None
            results[silo] = fitted(run, make_exchange)

        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(makers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    return [results[silo] for silo in range(len(makers))]


def test_scores_are_those_of_one_silo_and_of_scikit_learn(tmp_path):
    with distributed(device="cpu") as topology:
        expected, _, confusion, statistics = fitted(scored_run(topology))
    labels = data().test.labels
    names = [name for name in expected if name.startswith(("test/", "clients/", "client/"))]
    assert "test/auc" in names and "clients/worst_auc" in names and "client/0/test_auc" in names
    for metrics, model, its_confusion, measured in over_sites(tmp_path):
        for name in names:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-9), name
        for name in ("loss", "accuracy", "auc"):  # the coordinator's test set is that of all sites
            assert metrics[f"coordinator/{name}"] == pytest.approx(expected[f"test/{name}"], rel=1e-9), name
        assert not any(name.startswith("client/") and "coordinator" in name for name in metrics)
        assert torch.equal(its_confusion, confusion)
        for name, found in measured.items():
            torch.testing.assert_close(found, statistics[name], rtol=1e-14, atol=1e-15)
        inputs = (data().test.fetch(torch.arange(TESTS))[0] - measured["standardise.mean"]) / measured[
            "standardise.std"
        ]
        with torch.no_grad():
            outputs = model(inputs.float())
        scores = (outputs[:, 1] - outputs[:, 0]).numpy()
        assert metrics["test/auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
        ids = np.arange(0, TESTS, len(SIZES))
        assert metrics["client/0/test_auc"] == pytest.approx(roc_auc_score(labels[ids], scores[ids]), abs=1e-6)
