"""The state of an optimizer as a tree, wherever the optimizer keeps it: swapped between clients, and saved."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.optim.optimizers import parameters_of
from trainer.utils.errors import InputError

T = TypeVar("T")
State = dict[str, Any]

# What an optimizer keeps besides the state of its parameters.
GROUPS, COMMON, ADDED = "groups", "common", "added"

PERMUTED = "permuted"  # the kind of a tensor whose memory has another order of dimensions

PLAIN = (Tensor, bool, int, float, str, type(None))


class OptimizerState:
    """The state of a torch optimizer, as a tree of tensors and plain values.

    Most optimizers keep all of it in `state`, by parameter: {"0": {"momentum_buffer": tensor}, ...}. `common` are the
    entries there that belong to no parameter, `groups` those of the parameter groups that are no longer as they were
    made, and `added` what the optimizer's own `state_dict` adds. Torch's `load_state_dict` does not reset an optimizer,
    aliases its argument, and rounds the state to the precision of the parameters.

    Args:
        optimizer: as it is made.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.parameters = optimizer, parameters_of(optimizer)
        self.adds_state = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
        # Adagrad has a state before its first step.
        self.initial_state = clone([optimizer.state.get(parameter, {}) for parameter in self.parameters])
        self.initial_groups = [clone(_options(group)) for group in optimizer.param_groups]
        self.initial_added = clone(self._added())

    def state_dict(self) -> State:
        """Return the live state. Tensors are not copied.

        Raises:
            InputError: the optimizer keeps something that is neither a tensor nor a plain value.
        """
        state = self.optimizer.state
        tree = {str(i): self._encoded(state[p]) for i, p in enumerate(self.parameters) if p in state}
        groups = zip(self.optimizer.param_groups, self.initial_groups, strict=True)
        others = {
            GROUPS: {str(i): changed for i, pair in enumerate(groups) if (changed := self._encoded(_changed(*pair)))},
            COMMON: self._encoded({name: value for name, value in state.items() if not isinstance(name, Tensor)}),
            ADDED: self._encoded(self._added()),
        }
        return tree | {name: part for name, part in others.items() if part}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Install a `state_dict` without copying tensors; an empty one resets the optimizer."""
        optimizer = self.optimizer
        if self.adds_state:
            added = _decoded(state[ADDED]) if ADDED in state else clone(self.initial_added)
            optimizer.load_state_dict({**optimizer.state_dict(), **added})
        for place, (group, first) in enumerate(zip(optimizer.param_groups, self.initial_groups, strict=True)):
            for name in _options(group).keys() - first.keys():
                del group[name]
            changed = _decoded(state.get(GROUPS, {}).get(str(place), {}))
            group.update(clone(first) | _to_device(changed, group["params"][0].device))
        fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
        kept: dict[Any, State] = dict(_decoded(state.get(COMMON, {})))
        for place, (parameter, first) in enumerate(zip(self.parameters, self.initial_state, strict=True)):
            if str(place) in state:
                kept[parameter] = _to_device(_decoded(state[str(place)]), parameter.device, id(parameter) in fused)
            elif first:
                kept[parameter] = clone(first)
        optimizer.state = defaultdict(dict, kept)

    def _added(self) -> State:
        if not self.adds_state:
            return {}
        whole = self.optimizer.state_dict()
        return {name: value for name, value in whole.items() if name not in ("state", "param_groups")}

    def _encoded(self, values: Mapping[str, Any]) -> State:
        return {name: self._encode(name, value) for name, value in values.items()}

    def _encode(self, name: str, value: Any) -> Any:
        """Return a value as it is, or a container as a mapping from its kind to its items."""
        if isinstance(value, Tensor):
            return _encode_layout(value)
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: {str(place): self._encode(name, item) for place, item in enumerate(value)}}
        if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
            # Keys as JSON, so that 1 is not "1".
            return {"dict": {json.dumps(key): self._encode(name, item) for key, item in value.items()}}
        raise InputError(
            f"{type(self.optimizer).__name__} keeps a {type(value).__name__} as {name}, which no checkpoint can hold.\n"
            "  valid: an optimizer that keeps tensors, numbers and texts, or lists and mappings of these"
        )


def _encode_layout(tensor: Tensor) -> Any:
    """Return a tensor as it is, or as a contiguous view and the order of its dimensions in memory.

    Matrix products of other strides have other last bits, and a checkpoint would make a tensor contiguous.
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or not tensor.permute(order).is_contiguous():
        return tensor
    return {PERMUTED: {"tensor": tensor.permute(order), "order": json.dumps(order)}}


def decode_permuted(items: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a state has as a contiguous view and the order of its dimensions in memory."""
    order = json.loads(items["order"])
    return items["tensor"].permute([order.index(dimension) for dimension in range(len(order))])


CONTAINERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "list": lambda items: [_decode(items[str(place)]) for place in range(len(items))],
    "tuple": lambda items: tuple(_decode(items[str(place)]) for place in range(len(items))),
    PERMUTED: decode_permuted,
    "dict": lambda items: {json.loads(key): _decode(item) for key, item in items.items()},
}


def _decoded(tree: Mapping[str, Any]) -> State:
    return {name: _decode(value) for name, value in tree.items()}


def _decode(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    ((kind, items),) = value.items()
    return CONTAINERS[kind](items)


def _options(group: Mapping[str, Any]) -> State:
    return {name: value for name, value in group.items() if name != "params"}


def _changed(group: Mapping[str, Any], first: State) -> State:
    return {
        name: value for name, value in _options(group).items() if name not in first or not _is_same(value, first[name])
    }


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    return a is b or a == b


def _to_device(state: State, device: torch.device, is_fused: bool = False) -> State:
    """Move tensors to a device, except counters of steps, unless a fused kernel reads them."""
    return map_tensors(lambda tensor: tensor.to(device) if tensor.dim() or is_fused else tensor, state)


def map_tensors(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Return a tree of mappings, lists and tuples with a function of each of its tensors; other leaves are the same."""
    mapped: Any = tree
    if isinstance(tree, Tensor):
        mapped = function(tree)
    elif isinstance(tree, Mapping):
        mapped = {name: map_tensors(function, value) for name, value in tree.items()}
    elif isinstance(tree, list | tuple):
        mapped = [map_tensors(function, item) for item in tree]
        mapped = mapped if isinstance(tree, list) else tuple(mapped)
    return mapped


def clone(tree: T) -> T:
    """Copy a tree, including its tensors."""
    return map_tensors(lambda tensor: tensor.detach().clone(), tree)
