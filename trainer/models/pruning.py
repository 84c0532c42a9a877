"""Pruning: layers that train the numbers of their weights that are kept, and whose other numbers are zero for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.models.storage import rebind_parameter

Sparsity = float | Literal["2:4"]

TWO_OF_FOUR = "2:4"
POSITIONS = "_positions"  # ends the name of a frozen parameter: where in a weight its kept numbers are


@dataclass(frozen=True)
class Weight:
    """A weight, with the layers that have it, and its name in each. A tied one has several."""

    path: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]


def prune(module: nn.Module, sparsity: Sparsity) -> None:
    """Set the smallest numbers of a model's matrices and convolutions to zero for good, in place.

    These are the weights of two or more dimensions, embeddings among them. Their parameters keep their names, and have
    the kept numbers alone, in the shape [1, 1, kept], while `layer.weight` gives the dense tensor. So gradients,
    optimizer states and sums between silos are of kept numbers, without a rule for them anywhere.

    Args:
        module: the trained model.
        sparsity: the part of all these numbers together that becomes zero, such as 0.9; or 2:4, the smaller two of any
            four numbers along the second dimension, which is the input of a layer. With 2:4 a weight stays dense if
            that dimension is not a multiple of 4.

    Raises:
        ValueError: there is nothing to prune, or a weight would lose all its numbers.
    """
    weights = _weights(module)
    if sparsity == TWO_OF_FOUR:
        weights = [weight for weight in weights if weight.parameter.shape[1] % 4 == 0]
        masks = [_larger_two_of_four(weight.parameter.detach()) for weight in weights]
    else:
        masks = _largest([weight.parameter.detach() for weight in weights], float(sparsity))
    if all(mask.all() for mask in masks):
        wanted = " with an input that is a multiple of 4" if sparsity == TWO_OF_FOUR else " that is large enough"
        raise ValueError(
            f"model.prune={sparsity}: model={type(module).__name__} has no matrix or convolution{wanted}.\n"
            "  set model.prune=null"
        )
    if lost := [weight.path for weight, mask in zip(weights, masks, strict=True) if not mask.any()]:
        raise ValueError(
            f"model.prune={sparsity} leaves nothing of {', '.join(lost)}: all its numbers in model.init are among the "
            "smallest.\n  set a smaller part"
        )
    _keep(weights, masks)


def is_pruned(module: nn.Module) -> bool:
    """Return whether any weight of a model is pruned."""
    return bool(_pruned_shapes(module))


def unpruned(module: nn.Module) -> nn.Module:
    """Return a model as a dense one with the zeros in place: a copy, or itself if it is not pruned."""
    if not is_pruned(module):
        return module
    module = deepcopy(module)
    layers = [(layer, _shapes(layer)) for layer in module.modules()]
    # All of them before any is set, because tied weights share a parameter.
    dense = {id(layer._parameters[name]): getattr(layer, name).detach() for layer, shapes in layers for name in shapes}
    for layer, shapes in layers:
        if shapes:
            layer.__class__ = type(layer).__bases__[0]
        for name in shapes:
            parameter = layer.get_parameter(name)
            rebind_parameter(parameter, dense[id(parameter)])
            del layer._parameters[f"{name}{POSITIONS}"]
        if shapes and isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return module


def dense_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a pruned model, by name, as those of the dense one with the zeros in place.

    Args:
        module: the model; one that is not pruned gets its tensors back.
        tensors: of such a model, all positions among them.
    """
    dense = dict(tensors)
    for name, shape in _pruned_shapes(module).items():
        positions = dense.pop(f"{name}{POSITIONS}")
        if name in dense:  # and not with the clients
            dense[name] = _scatter(dense[name], positions, shape)
    return dense


def dense_sizes(module: nn.Module) -> dict[int, int]:
    """Return how many numbers each parameter has in the dense model, by its id; positions have none there."""
    sizes = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for layer in module.modules():
        for name, shape in _shapes(layer).items():
            sizes |= {id(layer._parameters[name]): shape.numel(), id(layer._parameters[f"{name}{POSITIONS}"]): 0}
    return sizes


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """Return the dense shapes of the pruned weights of a layer itself."""
    return getattr(layer, "pruned_shapes", {})


def _pruned_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the dense shapes of all pruned weights, by all their names."""
    return {
        f"{prefix}.{name}" if prefix else name: shape
        for prefix, layer in module.named_modules(remove_duplicate=False)
        for name, shape in _shapes(layer).items()
    }


def _weights(module: nn.Module) -> list[Weight]:
    """Return the weights of two or more dimensions, by torch's names: weight, in_proj_weight, weight_ih_l0."""
    found: dict[int, Weight] = {}
    for prefix, layer in module.named_modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None and parameter.dim() > 1 and "weight" in name:
                path = f"{prefix}.{name}" if prefix else name
                found.setdefault(id(parameter), Weight(path, parameter, [])).places.append((layer, name))
    return list(found.values())


def _largest(weights: Sequence[Tensor], zeros: float) -> list[Tensor]:
    """Return where the numbers are that stay if this part of them, the smallest, becomes zero."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights] or [torch.zeros(0)])
    removed = round(zeros * len(magnitudes))
    if not removed:
        return [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    # Not by topk, which does not say which of equal numbers it takes: all ranks must choose the same.
    threshold = magnitudes.kthvalue(removed).values
    stays = magnitudes > threshold
    equal = (magnitudes == threshold).nonzero().flatten()
    stays[equal[: len(magnitudes) - removed - int(stays.sum())]] = True
    parts = stays.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _larger_two_of_four(weight: Tensor) -> Tensor:
    """Return where the larger two of any four numbers along the second dimension are."""
    fours = weight.abs().movedim(1, -1).unflatten(-1, (-1, 4))
    larger = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, larger, True).flatten(-2).movedim(-1, 1)


def _keep(weights: Sequence[Weight], masks: Sequence[Tensor]) -> None:
    """Have parameters hold only these of their numbers, and their layers read them as dense tensors."""
    layers: dict[nn.Module, dict[str, torch.Size]] = {}
    for weight, mask in zip(weights, masks, strict=True):
        shape, parameter = weight.parameter.shape, weight.parameter
        positions = nn.Parameter(mask.flatten().nonzero().flatten(), requires_grad=False)
        # One dimension would be a bias to weight decay, and two a matrix to Muon.
        rebind_parameter(parameter, parameter.detach().flatten()[positions].view(1, 1, -1))
        for layer, name in weight.places:
            layer.register_parameter(f"{name}{POSITIONS}", positions)
            layers.setdefault(layer, {})[name] = shape
    for layer, shapes in layers.items():
        layer.__class__ = _pruned_class(layer, shapes)


def _pruned_class(layer: nn.Module, shapes: dict[str, torch.Size]) -> Any:
    """Return a class of the same name in which these attributes are the dense tensors of the parameters."""
    attributes: dict[str, Any] = {name: property(partial(_dense, name=name)) for name in shapes}
    if isinstance(layer, nn.RNNBase):  # keeps a list of its weights, which would be that of the last forward pass
        vars(layer).pop("_flat_weights")
        attributes["_flat_weights"] = property(_flat_weights, _ignore)
        attributes["_update_flat_weights"] = _ignore
    kind = type(layer)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "pruned_shapes": shapes, **attributes})


def _dense(layer: nn.Module, name: str) -> Tensor:
    kept, positions = layer._parameters[name], layer._parameters[f"{name}{POSITIONS}"]
    assert kept is not None and positions is not None
    return _scatter(kept, positions, _shapes(layer)[name])


def _flat_weights(layer: Any) -> list[Tensor]:
    return [getattr(layer, name) for name in layer._flat_weights_names]


def _ignore(layer: nn.Module, *arguments: object) -> None:
    """Do nothing where a recurrent layer renews its list of weights, which is made anew each time."""


def _scatter(kept: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    return kept.new_zeros(shape.numel()).index_copy_(0, positions, kept.flatten()).view(shape)
