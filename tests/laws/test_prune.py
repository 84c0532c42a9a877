"""Pruned weights: training them is a loop with masks, their zeros stay, and only the numbers that are kept travel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.laws.cases import (
    CLASSES,
    EXACT,
    FEATURES,
    SIZES,
    assert_close,
    assert_same,
    case_run,
    silos_of,
    tiny_data,
    tiny_model,
)
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import assert_bit_equal, noisy_choices, noisy_model
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.run_dir import RunDir
from trainer.distributed.compression import Int8, PowerSGD, TopK, Uncompressed, UpdateCompression
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.round import train_round
from trainer.loop.run import ModelFactory
from trainer.loop.train_state import TrainState
from trainer.models.flat import FlatModel, frozen_tensors
from trainer.models.pretrained import load_saved
from trainer.models.pruning import dense_tensors, prune, unpruned
from trainer.optim import GroupedOptimizerFactory, Muon
from trainer.utils.errors import InputError

WEIGHTS = 5 * FEATURES + CLASSES * 5  # of the two matrices of the tiny model
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "muon": partial(Muon, lr=0.01),
}
COMPRESSIONS: dict[str, UpdateCompression] = {
    "fp32": Uncompressed(),
    "int8": Int8(8),
    "topk": TopK(0.5),
    "powersgd": PowerSGD(1),
}
# Fragments of a model are cut by its numbers, of which a pruned one has fewer; what is personal is of no global model.
MASKABLE = [name for name in ["sync", *EXACT] if name not in ("streaming", "local")]


class Masked(nn.Linear):
    """A layer of which some weights are zero in every forward pass, written by hand."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


def dense() -> nn.Module:
    return tiny_model().double()


def pruned(dtype: torch.dtype = torch.float64) -> nn.Module:
    module = tiny_model().to(dtype)
    prune(module, 0.6)
    return module


def masked(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the same model with dense parameters and masks."""
    module, zeroed = tiny_model().to(dtype), unpruned(pruned())
    for name in ("0", "2"):
        layer = module.get_submodule(name)
        layer.__class__ = Masked
        layer.mask = (zeroed.get_submodule(name).weight != 0).to(dtype)  # pyright: ignore
    return module


def effective(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights and biases that the layers of either model use."""
    tensors = unpruned(module).state_dict()
    return {
        name: t * getattr(module.get_submodule(name[0]), "mask", 1.0) if "weight" in name else t
        for name, t in tensors.items()
    }


def train(name: str, silos: SiloSpec, model: ModelFactory, choices: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Return the model at the end, and the bytes of the last round."""
    with distributed(silos_of(name, silos)) as topology:
        state = TrainState(case_run(topology, name, {"model": model, **choices}))
        rounds = [train_round(state, state.run.sample_round(index)) for index in range(state.run.rounds)]
        assert rounds[-1] is not None
        return effective(state.model.module), int(rounds[-1]["bytes_between_silos"])


@pytest.mark.parametrize("name", MASKABLE)
@pytest.mark.quick_rows(6)
def test_it_is_training_with_masks(ranks, name: str):
    """For every algorithm."""
    ours, theirs = (ranks(2).run(train, name, 2, model, {})[0][0] for model in (pruned, masked))
    assert_close(ours, theirs)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_elementwise_optimizer_makes_the_same_bits(ranks, optimizer: str):
    """In float32 too, with weight decay of all that is kept."""
    make = GroupedOptimizerFactory(OPTIMIZERS[optimizer], exclude_norm_bias_decay=True)
    choices = {"data": tiny_data(sum(SIZES), torch.float32), "optimizer": make}
    models = (partial(make_model, torch.float32) for make_model in (pruned, masked))
    ours, theirs = (ranks(1).run(train, "sync", 1, model, choices)[0][0] for model in models)
    assert_same(ours, theirs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("silos", [1, 2, 3])
@pytest.mark.quick_rows(8)
def test_exactly_the_zeros_stay(ranks, optimizer: str, compression: str, silos: int):
    choices: dict[str, Any] = {"update_compression": COMPRESSIONS[compression]} if silos > 1 else {}
    choices |= {"optimizer": OPTIMIZERS[optimizer], "rounds": 3}
    for model, _ in ranks(silos).run(train, "fedavg", silos, pruned, choices):
        zeros = [int((model[name] == 0).sum()) for name in ("0.weight", "2.weight")]
        assert sum(zeros) == round(0.6 * WEIGHTS)
        for name, before in effective(pruned()).items():
            assert name.endswith("bias") or torch.equal(model[name] == 0, before == 0)


def wide_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    prune(module, "2:4")
    return module


def test_two_of_any_four_stay_zero(ranks):
    """Along the input, where it is a multiple of four; the other layer is dense."""
    model, _ = ranks(2).run(train, "fedavg", 2, wide_model, {})[0]
    assert ((model["2.weight"].unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all()
    assert (model["0.weight"] != 0).all()


def test_a_model_on_two_ranks_is_that_on_one(ranks):
    one, two = (ranks(size).run(train, "sync", 1, pruned, {})[0][0] for size in (1, 2))
    assert_close(two, one)


def large_model() -> nn.Module:
    """Return a pruned model with 450 of 4,500 weights and 503 biases."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(FEATURES, 500), nn.Tanh(), nn.Linear(500, CLASSES)).double()
    nn.init.normal_(module[0].weight)  # pyright: ignore
    nn.init.normal_(module[2].weight)  # pyright: ignore
    prune(module, 0.9)
    return module


def test_only_kept_numbers_travel(ranks):
    """Their sum and that of the biases between two silos; no positions. Each parameter is padded to a cache line."""
    _, sent = ranks(2).run(train, "fedavg", 2, large_model, {"rounds": 1})[0]
    numbers = 450 + 500 + CLASSES
    assert numbers <= sent / (2 * 8) < numbers + 4 * 8 + 16
    assert FlatModel(pruned()).shared_state().keys() == tiny_model().state_dict().keys()


def of_other_weights() -> nn.Module:
    """Return a model that every rank has pruned by weights of its own."""
    module = tiny_model(torch.distributed.get_rank()).double()
    prune(module, 0.6)
    return module


def refusal(silos: int) -> str:
    with pytest.raises(InputError) as error:
        train("fedavg", silos, of_other_weights, {})
    return str(error.value)


def test_other_weights_on_another_rank_are_refused(ranks):
    assert all("the same file model.init on all nodes" in message for message in ranks(2).run(refusal, 2))


def noisy_and_pruned() -> nn.Module:
    module = noisy_model()
    prune(module, 0.5)
    return module


@pytest.mark.parametrize("name", ["sync", "scaffold"])
def test_it_is_resumed_with_the_same_bits(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, noisy_choices(name) | {"model": noisy_and_pruned, "ema_decay": 0.9}, tmp_path)


def test_it_is_resumed_in_the_middle_of_a_round(ranks, tmp_path: Path):
    choices = noisy_choices("fedavg") | {"model": noisy_and_pruned}
    assert_left_and_bit_equal(ranks(2), "fedavg", 2, choices, tmp_path, {0: (0, 2)})


def write_models(folder: Path) -> tuple[Tensor, Tensor]:
    """Train and write the files of the models; return inputs, and the outputs of the model that has trained."""
    with distributed(2) as topology:
        choices = {"model": pruned, "checkpoint.every_rounds": 1, "ema_decay": 0.9, "monitor": "train/loss"}
        run = case_run(topology, "fedavg", choices)
        checkpoints = Checkpointer(folder / "checkpoints", topology, run.assignment_digest)
        result = fit(run, (), checkpoints)
        if topology.rank == 0:
            RunDir(folder).write_models(frozen_tensors(result.model), partial(dense_tensors, result.model))
        inputs, _ = run.data.test.fetch(torch.arange(21))
        return inputs, result.model(inputs).detach()


def test_the_files_have_the_dense_model(ranks, tmp_path: Path):
    """Its names and shapes, with the zeros in place; it gives the same bits as the model of the run."""
    inputs, outputs = ranks(2).run(write_models, tmp_path)[0]
    files = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("model", "best", "ema")}
    for tensors in files.values():
        assert {name: t.shape for name, t in tensors.items()} == {
            n: t.shape for n, t in tiny_model().state_dict().items()
        }
        assert sum(int((tensors[name] == 0).sum()) for name in ("0.weight", "2.weight")) == round(0.6 * WEIGHTS)
    loaded = dense()
    load_saved(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(inputs), outputs)
