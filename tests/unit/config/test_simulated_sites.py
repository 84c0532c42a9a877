"""The site of a simulation has the examples of one client, as the partition deals them, or those of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config.build import build_clients, load_data
from trainer.config.compose import compose_tree
from trainer.config.schema import Config, read_config
from trainer.data import DataSplits, TensorSource
from trainer.data.loading.silo_files import DatasetInfo, join_clients
from trainer.data.sources.agreement import Alone
from trainer.data.sources.selected import select_examples
from trainer.distributed.topology import Topology, distributed

SITES = 3
PART = {"train": "train", "validation": "train", "test": "test"}  # the source of a part of the clients


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


def simulated(site: int, *overrides: str) -> Config:
    place = [f"site.name=site-{site}", "site.server=localhost:1", "site.certificates=none"]
    return read_config(compose_tree(["algorithm=fedavg", *overrides, f"site.simulate={SITES}", *place]))


def joined(all_splits: list[DataSplits]) -> DataSplits:
    """Return the data of all sites, as a world that had all of them would join it."""
    infos = [DatasetInfo.of(splits) for splits in all_splits]
    return join_clients("the sites", ["a", "b", "c"], [0] * SITES, dict(enumerate(all_splits)), infos, Alone())


@pytest.mark.parametrize(
    "overrides",
    [
        ["partition=dirichlet", "partition.alpha=0.5"],
        ["partition=quantity", "partition.alpha=1", "data.validation=0.2"],
    ],
    ids=" ".join,
)
def test_the_sites_have_the_clients_of_one_silo(
    overrides: list[str], topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, validation and test, in their order, so that a federation trains the model of that silo."""
    pooled, expected = build_clients(
        read_config(compose_tree(["algorithm=fedavg", *overrides, f"clients={SITES}"])), topology
    )
    sites = [load_data(simulated(site, *overrides), topology) for site in range(SITES)]
    monkeypatch.setattr("trainer.config.build.load_data", lambda *_: joined(sites))
    together, clients = build_clients(simulated(0, *overrides), topology)
    for part, source in PART.items():
        for ours, theirs in zip(getattr(clients, part), getattr(expected, part), strict=True):
            ours, theirs = (
                getattr(data, source).fetch(torch.from_numpy(ids)) for data, ids in ((together, ours), (pooled, theirs))
            )
            assert all(map(torch.equal, ours, theirs))


def test_a_site_opens_its_file_alone(tmp_path: Path, topology: Topology) -> None:
    for site in (0, 2):
        np.savez(tmp_path / f"{site}.npz", x=np.full((20, 4), site, np.float32), y=np.arange(20) % 2)
    files = ",".join(str(tmp_path / f"{site}.npz") for site in range(SITES))
    overrides = ["data=npz", f"data.files=[{files}]", "model=mlp", "model.inputs=4"]
    for site in (0, 2):
        inputs, _ = load_data(simulated(site, *overrides), topology).train.fetch(torch.arange(2))
        assert inputs.eq(site).all()
    with pytest.raises(ValueError, match=r"1\.npz"):
        load_data(simulated(1, *overrides), topology)


def test_weights_are_those_of_the_selected_examples() -> None:
    source = TensorSource(torch.arange(6.0), torch.zeros(6))
    ids = {"train": np.array([1, 4]), "test": np.array([0])}
    selected = select_examples(DataSplits(source, source, classes=None, weights=np.arange(6.0)), ids)
    assert selected.weights is not None and selected.weights.tolist() == [1, 4]
    assert selected.train.fetch(torch.tensor([1]))[0].tolist() == [4] and len(selected.test) == 1


def test_a_table_is_dealt_with_its_columns(tmp_path: Path, topology: Topology) -> None:
    """Each site can fit an encoder to its rows; with that of all rows they are encoded as in the whole table."""
    rows = [f"{number if number % 7 else ''},{'ab'[number % 2]},{number % 3}" for number in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["age,ward,label", *rows]))
    overrides = ["data=csv", f"data.path={tmp_path / 't.csv'}", "data.columns.number=[age]"]
    overrides += ["data.columns.category=[ward]", "model=mlp", "model.inputs=3", "data.validation=0"]
    whole, clients = build_clients(
        read_config(compose_tree(["algorithm=fedavg", *overrides, f"clients={SITES}"])), topology
    )
    for site in range(SITES):
        splits = load_data(simulated(site, *overrides), topology)
        expected, labels = whole.train.fetch(torch.from_numpy(clients.train[site]))
        inputs, targets = splits.train.fetch(torch.arange(len(splits.train)))
        torch.testing.assert_close(inputs, expected)
        assert torch.equal(targets, labels)
        count, mean, squares = splits.train.rows.moments[:, 0]  # pyright: ignore
        present = splits.train.rows.numbers[:, 0] + mean  # pyright: ignore
        present = present[~np.isnan(present)]
        assert count == len(present)
        assert (mean, squares) == pytest.approx((present.mean(), present.var() * count), rel=1e-6)
