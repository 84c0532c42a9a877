"""Shifts change a client's examples, the same way in every run, and no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data import Clients, DataSplits, Iid, TensorSource
from trainer.data.transforms import ClientShift, LabelNoise, Noise, Rotation, shift_clients

COUNT, CLIENTS, CLASSES = 1200, 5, 4


def data() -> tuple[DataSplits, Clients]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(COUNT, 1, 8, 8, generator=generator)
    source = TensorSource(inputs, torch.randint(0, CLASSES, (COUNT,), generator=generator))
    test = TensorSource(inputs[:200].clone(), source.targets[:200].clone())
    clients = Iid().split(source, test, CLIENTS, seed=0).split_validation(0.1, seed=0)
    return DataSplits(source, test, CLASSES), clients


def changed(shift: ClientShift, seed: int = 0) -> tuple[DataSplits, DataSplits, Clients]:
    splits, clients = data()
    return splits, shift_clients(splits, clients, {"it": shift}, seed), clients


def of(splits: DataSplits, part: str, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    return getattr(splits, part).fetch(torch.from_numpy(ids))


def test_noise_grows_from_client_to_client():
    plain, noisy, clients = changed(Noise(2.0))
    for client in range(CLIENTS):
        for part, ids in (("train", clients.train), ("train", clients.validation), ("test", clients.test)):
            (before, labels), (after, same) = of(plain, part, ids[client]), of(noisy, part, ids[client])
            assert torch.equal(labels, same)
            assert float((after - before).std()) == pytest.approx(2.0 * client / (CLIENTS - 1), rel=0.1, abs=1e-9)


def test_images_turn_further_from_client_to_client():
    plain, turned, clients = changed(Rotation(360.0))
    for client, quarter in enumerate(range(CLIENTS)):
        before, after = of(plain, "test", clients.test[client])[0], of(turned, "test", clients.test[client])[0]
        np.testing.assert_allclose(after.numpy(), np.rot90(before.numpy(), quarter, (2, 3)), atol=1e-4)


def test_a_fraction_of_training_labels_is_of_another_class():
    plain, wrong, clients = changed(LabelNoise(0.3))
    differs = plain.train.fetch(torch.arange(COUNT))[1] != wrong.train.fetch(torch.arange(COUNT))[1]
    assert float(differs.double().mean()) == pytest.approx(0.3, abs=0.05)
    for ids in clients.train:
        assert float(differs[torch.from_numpy(ids)].double().mean()) == pytest.approx(0.3, abs=0.1)
    everyone = np.arange(200)
    assert torch.equal(of(plain, "test", everyone)[1], of(wrong, "test", everyone)[1])


def test_a_validation_set_of_its_own_is_shifted_as_the_test_set_is():
    splits, clients = data()
    own = DataSplits(splits.train, splits.test, CLASSES, validation=splits.test)
    clients = Clients(clients.train, clients.test, clients.test)
    noisy = shift_clients(own, clients, {"it": Noise(2.0), "labels": LabelNoise(0.3)}, 0)
    for client, ids in enumerate(clients.validation):
        (before, labels), (after, same) = of(own, "validation", ids), of(noisy, "validation", ids)
        assert torch.equal(labels, same)
        assert float((after - before).std()) == pytest.approx(2.0 * client / (CLIENTS - 1), rel=0.1, abs=1e-9)


def test_it_is_drawn_by_the_seed_and_leaves_the_source():
    splits, first, _ = changed(Noise(1.0))
    again, other = changed(Noise(1.0))[1], changed(Noise(1.0), seed=1)[1]
    ids = np.arange(COUNT)
    assert torch.equal(of(first, "train", ids)[0], of(again, "train", ids)[0])
    assert not torch.equal(of(first, "train", ids)[0], of(other, "train", ids)[0])
    assert torch.equal(of(splits, "train", ids)[0], of(data()[0], "train", ids)[0])


def test_two_kinds_are_one_after_the_other():
    splits, clients = data()
    both = shift_clients(splits, clients, {"noise": Noise(1.0), "labels": LabelNoise(0.5)}, 0)
    last = clients.train[-1]
    (before, labels), (after, wrong) = of(splits, "train", last), of(both, "train", last)
    assert not torch.equal(before, after) and not torch.equal(labels, wrong)


def test_nothing_costs_nothing():
    splits, clients = data()
    assert shift_clients(splits, clients, {}, 0) is splits


@pytest.mark.parametrize(
    ("shift", "inputs", "message"),
    [
        (Noise(), torch.zeros(4, 3, dtype=torch.int64), "inputs are integers"),
        (Rotation(), torch.zeros(4, 3), "not images"),
        (LabelNoise(), torch.zeros(4, 3), "no labels"),
    ],
)
def test_examples_that_cannot_be_shifted_are_refused(shift: ClientShift, inputs: Tensor, message: str):
    source = TensorSource(inputs, torch.zeros(4))
    clients = Iid().split(source, source, 2, 0)
    with pytest.raises(ValueError, match=message):
        shift_clients(DataSplits(source, source, None), clients, {"it": shift}, 0)


def test_a_part_is_a_part():
    with pytest.raises(ValueError, match="valid: above 0, up to 1"):
        LabelNoise(1.5)
