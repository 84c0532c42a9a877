"""Pruning against numpy, for layers of every kind, and what others see of a pruned model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.models import GPT, LSTM, MLP, DigitsCNN, ViT, describe_model
from trainer.models.pruning import Sparsity, prune, unpruned
from trainer.optim import GroupedOptimizerFactory


class Attending(nn.Module):
    """Torch's own attention, which reads the weights of its layers by itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


TOKENS = torch.arange(24).view(2, 12) * 7 % 16
Make = Callable[[], nn.Module]
MODELS: dict[str, tuple[Make, Tensor, Sparsity]] = {
    "linear": (partial(MLP, inputs=12, hidden=8, classes=4), torch.randn(3, 12), 0.5),
    "convolution": (partial(DigitsCNN, channels=8, hidden=8), torch.randn(3, 1, 8, 8), 0.8),
    "convolution 2:4": (partial(DigitsCNN, channels=8, hidden=8), torch.randn(3, 1, 8, 8), "2:4"),
    "tied": (partial(GPT, vocabulary=16, length=12, layers=1, heads=2, width=8), TOKENS, 0.5),
    "recurrent": (partial(LSTM, vocabulary=16, embedding=4, width=8), TOKENS, 0.5),
    "patches": (partial(ViT, size=8, width=16, layers=1, heads=2), torch.randn(2, 3, 8, 8), "2:4"),
    "attention": (Attending, torch.randn(2, 5, 16), 0.5),
}


def trained(make: Make) -> nn.Module:
    """Return a model of which every matrix has large and small numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = make()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter)
        return module


def matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.dim() > 1 and "weight" in name}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_dense_model(name: str):
    """Of the same names, with the same zeros, and gradients of the kept numbers alone."""
    make, inputs, sparsity = MODELS[name]
    module, before = trained(make), trained(make)
    prune(module, sparsity)
    dense = unpruned(module)
    assert type(dense) is type(before)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}
    for name, parameter in dense.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], before.get_parameter(name)[kept])
    outputs = module(inputs)
    assert torch.equal(outputs, dense(inputs))
    outputs.square().sum().backward()
    dense(inputs).square().sum().backward()
    ours, theirs = dict(module.named_parameters()), dict(dense.named_parameters())
    for name, parameter in theirs.items():
        positions = ours.get(f"{name}_positions", torch.arange(parameter.numel()))
        expected, found = parameter.grad, ours[name].grad
        assert expected is not None and found is not None
        assert torch.equal(expected.flatten()[positions], found.flatten())
    assert torch.equal(deepcopy(module)(inputs), outputs)


def test_the_smallest_numbers_of_all_matrices_together_are_zero():
    """By numpy; norms, biases and positions that are no layer's weight stay as they are."""
    module = trained(partial(ViT, size=8, width=16, layers=1, heads=2))
    magnitudes = {name: weight.abs().numpy() for name, weight in matrices(module).items()}
    every = np.sort(np.concatenate([weight.flatten() for weight in magnitudes.values()]))
    removed = round(0.7 * len(every))
    prune(module, 0.7)
    dense = dict(unpruned(module).named_parameters())
    for name, magnitude in magnitudes.items():
        assert np.array_equal(dense[name].detach().numpy() == 0, magnitude <= every[removed - 1])
    assert dense["positions"].count_nonzero() == dense["positions"].numel()


def test_of_equal_numbers_the_first_stay():
    """So all ranks choose the same ones."""
    module = nn.Linear(10, 10)
    nn.init.ones_(module.weight)
    prune(module, 0.25)
    assert torch.equal(module.weight.flatten(), (torch.arange(100) < 75).float())


def test_the_larger_two_of_any_four_stay():
    """By numpy, along the input channels of a convolution."""
    module = nn.Conv2d(8, 3, 3)
    fours = np.moveaxis(module.weight.detach().numpy(), 1, -1).reshape(3, 3, 3, 2, 4)
    second = np.sort(np.abs(fours), axis=-1)[..., 2:3]
    expected = np.moveaxis(np.where(np.abs(fours) >= second, fours, 0).reshape(3, 3, 3, 8), -1, 1)
    prune(module, "2:4")
    assert np.array_equal(module.weight.detach().numpy(), expected)


def test_tied_weights_stay_tied():
    make, _, sparsity = MODELS["tied"]
    module = trained(make)
    prune(module, sparsity)
    dense = unpruned(module)
    assert isinstance(dense, GPT) and dense.output.weight is dense.tokens.weight
    assert isinstance(module, GPT) and torch.equal(module.output.weight, module.tokens.weight)
    assert module.flops_per_token(12) == dense.flops_per_token(12), "the operations of the dense model"


def test_a_frozen_weight_is_pruned_and_stays_frozen():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[0].requires_grad_(False)
    prune(module, 0.5)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["1.weight", "1.bias"]
    assert not unpruned(module)[0].weight.requires_grad  # pyright: ignore


def test_a_model_that_is_not_pruned_is_its_own_dense_one():
    module = MLP()
    assert unpruned(module) is module


def test_kept_numbers_decay_and_biases_do_not():
    """By exclude_norm_bias_decay, as in the dense model."""
    module = nn.Linear(8, 8)
    prune(module, 0.5)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    make = GroupedOptimizerFactory(partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), exclude_norm_bias_decay=True)
    optimizer = make([(name, p) for name, p in module.named_parameters() if p.requires_grad])
    (0 * F.linear(torch.ones(1, 8), module.weight, module.bias).sum()).backward()
    optimizer.step()
    after = dict(module.named_parameters())
    for name, factor in (("weight", 0.95), ("bias", 1.0)):
        torch.testing.assert_close(after[name].detach(), before[name] * factor)


def test_the_summary_counts_the_dense_model_and_its_zeros():
    """A row has the part of its own matrices that is zero, and the first line that of all."""
    module = trained(partial(MLP, inputs=784, hidden=200))
    module.get_submodule("layers.5").requires_grad_(False)
    prune(module, 0.9)
    dense = dict(unpruned(module).named_parameters())
    zeros = {i: f"{100 * float((dense[f'layers.{i}.weight'] == 0).double().mean()):.1f} % zero" for i in (1, 3, 5)}
    assert describe_model(module).splitlines() == [
        "MLP, 199,210 parameters, 2,010 frozen, 90.0 % zero",
        f"  layers.1  157,000  Linear, {zeros[1]}",
        f"  layers.3   40,200  Linear, {zeros[3]}",
        f"  layers.5    2,010  Linear, frozen, {zeros[5]}",
    ]


@pytest.mark.parametrize(
    ("module", "sparsity", "message"),
    [
        (nn.BatchNorm1d(4), 0.5, "model=BatchNorm1d has no matrix or convolution that is large enough"),
        (nn.Linear(3, 3), "2:4", "no matrix or convolution with an input that is a multiple of 4"),
        (nn.Linear(2, 2), 0.01, "no matrix or convolution that is large enough"),
        (nn.Linear(2, 2), 0.99, "leaves nothing of weight"),
    ],
)
def test_what_cannot_be_pruned_is_refused(module: nn.Module, sparsity: Sparsity, message: str):
    with pytest.raises(ValueError, match=message):
        prune(module, sparsity)
