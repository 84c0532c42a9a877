"""Models as users bring them: layers and parameters of many kinds train, are saved, and resume with equal bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.cli.command import work
from tests.laws.cases import CLASSES, FEATURES, SIZES, assert_same, case_run, leaves, silos_of, tiny_data
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.run_dir import RunDir
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit

ROUNDS = 2


class Recurrent(nn.Module):
    """An LSTM over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, num_layers=2, batch_first=True, dropout=0.1), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs[..., None])[0][:, -1])


class Attention(nn.Module):
    """A transformer encoder over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(inputs[..., None])).mean(1))


class Images(nn.Module):
    """The features as images of 2 x 3, which are padded by reflection and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Linear(48, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        images = F.interpolate(inputs.reshape(-1, 1, 2, 3), scale_factor=2, mode="bilinear")
        return self.head(self.convolution(images).flatten(1))


class Odd(nn.Module):
    """A parameter without elements, one without dimensions, one that is not contiguous, and inputs scaled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.none, self.scale = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(0.5))
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES).T)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mul_(2) @ self.weight.T * self.scale + self.none.sum()


class Tied(nn.Module):
    """A layer under two names, and a tensor that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Linear(FEATURES, FEATURES)
        self.encoder, self.decoder = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder(self.again(self.first(inputs))) + self.decoder(inputs)


class Half(nn.Module):
    """Parameters in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES, dtype=torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.to(torch.bfloat16)).float()


class Lazy(nn.Module):
    """Layers whose sizes are those of the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": Recurrent,
    "attention": Attention,
    "images": Images,
    "odd": Odd,
    "tied": Tied,
    "half": Half,
    "weight_norm": lambda: weight_norm(nn.Linear(FEATURES, CLASSES)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(FEATURES, CLASSES)),
}


def make(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]()


def train(model: str, name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the initial model, that of a run, and that of the run in two parts."""
    sizes = [9] if name == "sync" else SIZES
    choices = {"sizes": sizes, "data": tiny_data(sum(sizes), torch.float32), "rounds": ROUNDS}
    models = [leaves(make(model).state_dict())]
    with distributed(silos_of(name, 2)) as topology:
        for parts in ((ROUNDS,), (1, ROUNDS)):
            for until in parts:
                run = case_run(topology, name, choices | {"module": make(model), "checkpoint.every_rounds": 1})
                checkpoints = Checkpointer(folder / str(len(parts)), topology, run.assignment_digest)
                result = fit(run, (), checkpoints, checkpoints.latest(), until=until)
            models.append(leaves(result.model.state_dict()))
    return models[0], models[1], models[2]


@pytest.mark.parametrize("name", ["sync", "fedavg"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.quick_rows(5)
def test_models_of_any_kind(ranks, model: str, name: str, tmp_path: Path):
    """Of the 9 examples of `sync` the last batch has one, so one of two replicas has none."""
    for initial, trained, resumed in ranks(2).run(train, model, name, tmp_path):
        assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
        moved = {key for key, tensor in trained.items() if not torch.equal(tensor, initial[key])}
        still = {"none"} if model == "odd" else set()
        assert {key for key, _ in make(model).named_parameters()} - moved == still
        assert_same(resumed, trained)


def test_lazy_layers(ranks, tmp_path: Path):
    """They get their sizes in the check before training; a smoke run makes the model again to resume."""
    overrides = ["model=custom", f"model._target_={__name__}.Lazy", "algorithm=fedavg", "silos=2", "run.smoke=true"]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path / 'run'}"])
    assert RunDir(tmp_path / "run").result()["round"] == 2


def test_a_run_folder_may_be_moved(ranks, tmp_path: Path):
    """It holds no paths of its own: it is resumed under another name."""
    overrides = ["model=logistic", "model.inputs=64", "model.classes=10", "round.steps=1"]
    ranks(2).run(work, [*overrides, "rounds=1", f"run_dir={tmp_path / 'here'}"])
    (tmp_path / "here").rename(tmp_path / "there")
    ranks(2).run(work, [*overrides, "rounds=2", f"run_dir={tmp_path / 'there'}"])
    assert RunDir(tmp_path / "there").result()["round"] == 2 and not (tmp_path / "here").exists()
