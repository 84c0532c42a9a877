"""FlatModel: parameters are aligned views, split by name; statistics pool to those of the union."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.models import GPT
from trainer.models.flat import ALIGNMENT_BYTES, FlatModel


def small(dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of odd sizes with batch statistics and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 7), nn.Linear(7, 2)).to(dtype)
    model[2].requires_grad_(False)
    return model


def head_is_personal(name: str) -> bool:
    return not name.startswith("3.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_are_aligned_views_of_the_vector(dtype: torch.dtype):
    """Each begins at a multiple of 64 bytes, keeps its values, and changes with the vector; the padding is zero."""
    before = {name: parameter.clone() for name, parameter in small(dtype).named_parameters()}
    module = small(dtype)
    model = FlatModel(module)
    covered = torch.zeros(len(model.shared), dtype=torch.bool)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        if parameter.requires_grad:
            offset = parameter.data_ptr() - model.shared.data_ptr()
            assert offset % ALIGNMENT_BYTES == 0
            start = offset // parameter.element_size()
            assert not covered[start : start + parameter.numel()].any()
            covered[start : start + parameter.numel()] = True
    assert covered.sum() == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert not model.shared[~covered].any()
    model.shared += 1
    assert all(torch.equal(p, before[n] + 1) for n, p in module.named_parameters() if p.requires_grad)
    assert torch.equal(module[2].weight, before["2.weight"])


def train(module: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()
    return module.state_dict()


def test_training_through_the_views_is_bit_equal():
    module = small()
    FlatModel(module)
    ours, theirs = train(module, 20), train(small(), 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_vectors_are_split_by_name():
    """Parameters that `is_shared` excludes, and frozen ones, are not in the shared vector."""
    module = small()
    model = FlatModel(module, head_is_personal)
    assert model.shared_names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model.personal_names == ["3.weight", "3.bias"]
    model.personal.zero_()
    assert not module[3].weight.any() and not module[3].bias.any()
    assert module[0].weight.any()
    assert len(model.trainable) == 6
    assert model.has_personal and not FlatModel(small()).has_personal


def test_personal_state_is_saved_and_loaded():
    """Two clients use one model: each gets its head and its batch statistics again."""
    module = small()
    model = FlatModel(module, lambda name: not name.startswith(("1.running", "3.")))
    first = model.personal_state()
    assert set(first) == {"parameters", "1.running_mean", "1.running_var"}
    kept = {name: tensor.clone() for name, tensor in first.items()}
    model.personal.add_(1)
    module[1].running_mean.fill_(7)
    second = model.personal_state()
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    model.load_personal_state(first)
    assert torch.equal(module[1].running_mean, torch.zeros(5))
    model.load_personal_state(second)
    assert torch.equal(module[1].running_mean, torch.full((5,), 7.0))
    assert torch.equal(model.personal, kept["parameters"] + 1)


def test_a_personal_vector_may_end_with_its_last_parameter():
    """As one that was put together from parts does."""
    model = FlatModel(small(), head_is_personal)
    kept = model.personal_state()
    end = max(placed.start + placed.box.numel for placed in model.personal_layout)
    assert end < len(model.personal)
    model.personal.zero_()
    model.load_personal_state({**kept, "parameters": kept["parameters"][:end]})
    assert torch.equal(model.personal, kept["parameters"])


def test_shared_state_round_trips():
    """Another model gets buffers too, but no personal and no frozen parameters."""
    source, target = small(), small()
    model = FlatModel(source, head_is_personal)
    for tensor in source.state_dict().values():
        tensor.fill_(3)
    state = model.shared_state()
    assert set(state) == set(source.state_dict()) - {"2.weight", "2.bias", "3.weight", "3.bias"}
    other = FlatModel(target, head_is_personal)
    pointer, head = other.shared.data_ptr(), other.personal.clone()
    other.load_shared_state(state)
    assert all((target.state_dict()[name] == 3).all() for name in state)
    assert other.shared.data_ptr() == pointer and (other.shared[:15] == 3).all()
    assert torch.equal(other.personal, head)
    source[0].weight.data.fill_(4)
    assert (state["0.weight"] == 3).all()


@pytest.mark.parametrize("change", ["a name more", "a name less"])
def test_a_state_of_another_model_is_refused(change: str):
    """It has an unknown tensor, or lacks one; personal ones are not expected."""
    model = FlatModel(small(), head_is_personal)
    state = model.shared_state()
    if change == "a name more":
        state["0.gain"] = torch.zeros(1)
    else:
        del state["0.bias"]
    with pytest.raises(ValueError, match=r"model=.*0\."):
        model.load_shared_state(state)


def test_tied_parameters_are_stored_once():
    """The output of a GPT is its embedding."""
    module = GPT(vocabulary=16, length=4, layers=1, heads=1, width=16)
    model = FlatModel(module)
    assert model.shared_names.count("tokens.weight") == 1 and "output.weight" not in model.shared_names
    assert module.output.weight is module.tokens.weight
    assert len(model.shared) == sum(parameter.numel() for parameter in module.parameters())


def test_a_personal_tensor_is_personal_under_all_its_names():
    """The personal embedding of a GPT has a second name in its output layer."""
    model = FlatModel(GPT(vocabulary=16, length=4, layers=1, heads=1, width=16), lambda name: "blocks" in name)
    assert not {"tokens.weight", "output.weight"} & set(model.shared_state())


@pytest.mark.parametrize("freeze", [True, False])
def test_what_cannot_be_trained_is_refused(freeze: bool):
    """There is no trainable parameter, or there are trainable parameters of two types."""
    module = small().requires_grad_(not freeze)
    if not freeze:
        module[0].double()
    with pytest.raises(ValueError, match="no trainable parameter" if freeze else r"several types.*float32.*float64"):
        FlatModel(module)


@pytest.mark.parametrize(
    ("layer", "has"),
    [(nn.BatchNorm1d(2), True), (nn.BatchNorm2d(2), True), (nn.LayerNorm(2), False), (nn.GroupNorm(1, 2), False)],
)
def test_layers_that_normalize_by_the_batch(layer: nn.Module, has: bool):
    assert FlatModel(nn.Sequential(nn.Linear(2, 2), layer)).has_batch_statistics is has


def test_a_model_without_buffers_has_empty_statistics():
    statistics = FlatModel(nn.Linear(2, 2)).statistics
    assert statistics.vector().shape == statistics.counts().shape == (0,)
    statistics.load(statistics.vector(), statistics.counts())
