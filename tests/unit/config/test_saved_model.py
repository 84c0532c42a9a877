"""The model of a run folder as a plain module: the same outputs, whatever its buffers, and nothing foreign is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import trainer
from trainer.checkpoint.format import write_tensors
from trainer.config.adapter import adapt
from trainer.models import MLP, DigitsCNN
from trainer.models.adapters import adapter_parameters
from trainer.utils.seeding import preserve_random_states, seed_default_generators

NO_ADAPTER = {"_target_": "trainer.models.no_adapter"}
OWN = """
import torch
from torch import nn
import pathlib
pathlib.Path(__file__).with_name("imported").touch()

class Own(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.LazyLinear(width)
        self.norm = nn.BatchNorm1d(width)
        self.tied = nn.Linear(width, width)
        self.tied_too = nn.Linear(width, width)
        self.tied_too.weight = self.tied.weight
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("later", None)

    def forward(self, inputs):
        return self.tied_too(self.tied(self.norm(self.first(inputs)))) + self.seen.sum()
"""


def write_run(
    folder: Path, component: dict[str, Any], module: nn.Module, *names: str, adapter: Any = NO_ADAPTER
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": component, "adapter": adapter, "seed": 0}))
    (folder / "state.json").write_text('{"status": "finished"}\n')
    for name in names or ("model",):
        write_tensors(folder / f"{name}.safetensors", module.state_dict())
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return the path of a user's module, which leaves a mark where it is imported."""
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("own_model", None)


@pytest.mark.parametrize("weights", ["last", "best", "ema"])
def test_a_model_of_ours(tmp_path: Path, weights: Any):
    """It is in evaluation mode, and the generators of the notebook are where they were."""
    modules = {name: DigitsCNN() for name in ("model", "best", "ema")}
    for name, module in modules.items():
        write_run(tmp_path / "run", {"_target_": "trainer.models.DigitsCNN", "init": "/nowhere"}, module, name)
    before = torch.get_rng_state()
    loaded = trainer.load_model(tmp_path / "run", weights=weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training
    inputs = torch.randn(3, 1, 8, 8)
    expected = modules["model" if weights == "last" else weights].eval()(inputs)
    assert torch.equal(loaded(inputs), expected)


def test_a_model_of_ones_own_with_buffers_of_other_shapes(tmp_path: Path, own: Path):
    """Lazy layers, statistics, tied weights, a buffer that has grown, and one that was None when it was made."""
    from own_model import Own  # pyright: ignore[reportMissingImports]

    module = Own(4)
    inputs = torch.randn(8, 3)
    module(inputs)
    module.seen, module.later = torch.arange(3.0), torch.ones(2)
    folder = write_run(tmp_path / "run", {"_target_": "own_model.Own", "width": 4}, module)
    loaded = trainer.load_model(folder, trust=["own_model.Own"])
    assert torch.equal(loaded(inputs), module.eval()(inputs))
    assert torch.equal(loaded.get_buffer("later"), module.later)
    assert loaded.tied_too.weight is loaded.tied.weight


@pytest.mark.parametrize(
    "component",
    [
        {"_target_": "own_model.Own", "width": 4},
        {"_target_": "trainer.models.MLP", "inputs": {"_target_": "own_model.Own", "width": 4}},
        {"_target_": "trainer.models.MLP", "inputs": [{"_target_": "own_model.Own"}]},
        {"_target_": "trainer.models.MLP", "inputs": "${oc.env:HOME}"},
    ],
)
def test_a_strangers_folder_executes_nothing(tmp_path: Path, own: Path, component: dict[str, Any]):
    folder = write_run(tmp_path / "run", component, DigitsCNN())
    with pytest.raises(ValueError, match=r"own_model\.Own, which is not silotrain's|has references"):
        trainer.load_model(folder, trust=["own_model.Other", "own_model"])
    assert not own.exists()


@pytest.mark.parametrize("target", ["os.system", "trainer.loggers.wandb_mlflow.MLFlowLogger", "torch.optim.SGD"])
def test_only_models_of_conf_are_ours(tmp_path: Path, target: str):
    folder = write_run(tmp_path / "run", {"_target_": target}, DigitsCNN())
    with pytest.raises(ValueError, match=rf"{target}, which is not silotrain's: nothing was imported"):
        trainer.load_model(folder)


def test_what_is_missing_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", {"_target_": "trainer.models.DigitsCNN"}, DigitsCNN())
    with pytest.raises(ValueError, match=r"has no best\.safetensors; its run is finished\.\n  valid: 'last'"):
        trainer.load_model(folder, weights="best")
    with pytest.raises(ValueError, match=r"weights='newest'\n  valid: 'best', 'last', 'ema'"):
        trainer.load_model(folder, weights="newest")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="is no run folder"):
        trainer.load_model(tmp_path / "other")
    write_tensors(folder / "model.safetensors", {"strange": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not fit DigitsCNN: it lacks .*; it has besides strange"):
        trainer.load_model(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="cannot be read"):
        trainer.load_model(folder)


def test_an_adapter_is_put_on_its_base(tmp_path: Path):
    """The base is in no file of the run: it comes from the seed."""
    pytest.importorskip("peft")
    adapter = {"_target_": "trainer.models.lora", "rank": 2, "alpha": 4}
    component = {"_target_": "trainer.models.MLP", "inputs": 6, "hidden": 8, "classes": 3}
    run = tmp_path / "run"
    with preserve_random_states(torch.device("cpu")):
        seed_default_generators(torch.device("cpu"), 0, "initial parameters")
        module = MLP(inputs=6, hidden=8, classes=3)
    adapt(module, adapter)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    names = adapter_parameters(module)
    write_run(run, component, nn.Module(), adapter=adapter)
    write_tensors(
        run / "model.safetensors", {name: p.detach() for name, p in module.named_parameters() if name in names}
    )
    inputs = torch.randn(4, 6)
    assert torch.equal(trainer.load_model(run)(inputs), module.eval()(inputs))
