"""Recomputation: units keep their inputs alone, and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(units: Iterable[nn.Module]) -> None:
    """Have units compute their activations again in the backward pass, with the same random numbers.

    Chen et al. 2016 (arXiv 1604.06174): less memory, for about a third more time. Gradients are the same, bit for bit.
    Buffers, such as BatchNorm's statistics, are as they are after the forward pass.
    """
    for unit in units:
        unit.forward = _recomputed(unit, unit.forward)


def _recomputed(unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _unchanged_buffers(unit)

    def call(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)

    return call


@contextmanager
def _unchanged_buffers(unit: nn.Module) -> Iterator[None]:
    """Restore the buffers of a unit, also where recomputation ends with an exception since nothing more is needed."""
    before = [(buffer, buffer.clone()) for buffer in unit.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
