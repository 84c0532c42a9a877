"""Sites measure of their examples what one silo measures that has them all, and numpy."""

from __future__ import annotations

import threading
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tests.unit.data.readers.test_table_columns import COLUMNS, frame
from tests.unit.federation.test_exchange import Hall, Hosts
from trainer.data import csv, per_client_partition
from trainer.data.loading.class_weights import apply_class_weights
from trainer.data.loading.silo_files import DatasetInfo, join_clients, kind_error, load_silo_files, with_central
from trainer.data.partition.partition import Iid
from trainer.data.sources.agreement import Alone
from trainer.distributed.topology import distributed
from trainer.federation.agreement import CoordinatorAgreement, SiteAgreement
from trainer.federation.messages import Limit
from trainer.federation.registry import Registry
from trainer.federation.spool import Spool
from trainer.tasks import Classification

NAMES = ["berlin", "paris", "rome"]


@pytest.fixture
def files(tmp_path):
    """Write a table for each site: none has all categories, and one has no age."""
    tables = [frame(40), frame(50, seed=1), frame(20, seed=2)]
    tables[0]["age"] = None
    tables[0] = tables[0][tables[0].city != "Rome"]
    tables[1] = tables[1][tables[1].city != "Bonn"]
    for name, table in zip(NAMES, tables, strict=True):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return [str(tmp_path / f"{name}.csv") for name in NAMES]


def read(file):
    return csv(file, columns=COLUMNS, test_path=file)


def weights_of(splits):
    clients = per_client_partition(splits, Iid(), None)
    weights = apply_class_weights(Classification("balanced"), splits, clients)
    return weights.clients, [weights.examples[ids].tolist() for ids in clients.train]


def in_threads(*calls):
    """Return the results of calls that wait for each other."""
    results, threads = {}, []
    for place, call in enumerate(calls):
        thread = threading.Thread(target=lambda place=place, call=call: results.update({place: call()}), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(20)
    return [results[place] for place in range(len(calls))]


def over_sites(files, registry):
    """Return the encoder, the weights of the clients and those of its examples of each site, and the coordinator's."""
    infos, homes = [DatasetInfo.of(read(file)) for file in files], range(len(files))

    def work(agreement, local):
        splits = join_clients("the sites", NAMES, homes, local, infos, agreement)
        return splits, *weights_of(splits)

    sites = [
        partial(work, SiteAgreement(Hall(registry, name)), {place: read(files[place])})
        for place, name in enumerate(NAMES)
    ]
    return in_threads(*sites, partial(work, CoordinatorAgreement(Hosts(registry)), {}))


def test_measured_numbers_are_those_of_one_silo(files, tmp_path):
    registry = Registry(Spool(tmp_path / "meetings"), NAMES, grace_seconds=0)
    *sites, (coordinator, client_weights, _) = over_sites(files, registry)
    with distributed(device="cpu") as topology:
        expected = load_silo_files(files, read, topology)
        clients, examples = weights_of(expected)
    assert client_weights == clients
    assert coordinator.encoder == expected.encoder
    assert coordinator.train.fetch(torch.arange(1))[0].shape == expected.train.fetch(torch.arange(1))[0].shape
    for place, (splits, its_clients, its_examples) in enumerate(sites):
        assert splits.encoder == expected.encoder
        assert its_clients == clients
        assert its_examples[place] == examples[place]

    pooled = pd.concat([pd.read_csv(file) for file in files], ignore_index=True)
    filled = pooled.age.fillna(pooled.age.mean())
    age = coordinator.encoder.numbers["age"]
    assert (age.mean, age.std) == pytest.approx((filled.mean(), filled.std(ddof=0)), rel=1e-12)
    assert coordinator.encoder.categories["city"].categories == tuple(sorted(pooled.city.dropna().unique()))
    assert coordinator.encoder.categories["city"].fill == pooled.city.mode()[0]


def test_a_coordinator_that_is_started_again_has_the_same_numbers(files, tmp_path):
    *_, (before, weights, _) = over_sites(files, Registry(Spool(tmp_path / "meetings"), NAMES))
    infos = [DatasetInfo.of(read(file)) for file in files]
    again = CoordinatorAgreement(Hosts(Registry(Spool(tmp_path / "meetings"), NAMES)))  # without a site
    splits = join_clients("the sites", NAMES, range(3), {}, infos, again)
    assert splits.encoder == before.encoder
    assert weights_of(splits)[0] == weights


def test_a_site_that_has_vanished_is_waited_for(tmp_path):
    registry, asked = Registry(Spool(tmp_path / "meetings"), NAMES, grace_seconds=0, min_members=1), []

    def is_stopping():
        asked.append(len(asked))
        return len(asked) > 3

    sites = [partial(SiteAgreement(Hall(registry, name)).total, "columns-ages", np.ones(1)) for name in NAMES[:2]]
    for site in sites:
        threading.Thread(target=site, daemon=True).start()
    limit = Limit.like((), {"sums": torch.ones(1, dtype=torch.float64)})
    assert registry.gather("start/columns-ages", limit, None, is_stopping) is None


def test_other_columns_are_refused(files):
    infos = [DatasetInfo.of(read(files[0])), DatasetInfo.of(csv(files[1], columns={"number": ["age"]}))]
    message = kind_error("the sites", NAMES[:2], infos)
    assert "the sites hold different kinds of examples" in message
    assert "berlin has numbers [age, time, same], categories [city, sex], imputed by mean and most_frequent" in message
    assert "but paris numbers [age], imputed by" in message


def test_descriptions_of_data_are_read_again(files):
    info = DatasetInfo.of(read(files[0]))
    assert DatasetInfo.from_tree(asdict(info)) == info
    with pytest.raises(ValueError, match="it describes no data"):
        DatasetInfo.from_tree({"train": "many"})


def test_a_coordinator_has_test_examples_of_the_same_kind(files):
    paris, own = read(files[1]), read(files[2])
    info = DatasetInfo.of(paris)
    joined = join_clients("the sites", NAMES[1:2], [0], {0: paris}, [info], Alone())
    found = with_central(joined, own, "paris", info)
    assert found.has_central and len(found.central) == len(own.train) + len(own.test)
    inputs, _ = found.central.fetch(torch.arange(2))
    assert torch.equal(inputs, own.encoded_by(joined.encoder).train.fetch(torch.arange(2))[0])
    with pytest.raises(ValueError, match="the sites and the coordinator hold different kinds"):
        with_central(joined, csv(files[2], columns={"number": ["age"]}), "paris", info)
