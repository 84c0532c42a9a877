"""Floating point operations of training, the numerator of the model FLOPs utilization (MFU)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class SupportsFlops(Protocol):
    """A module with known operations per token; its runs have the metric `mfu`."""

    def flops_per_token(self, length: int) -> float:
        """Return the operations per token of a forward and a backward pass over sequences of `length` tokens."""
        ...


def transformer_flops(parameters: int, layers: int, width: int, length: int) -> float:
    """Return the operations per token of a transformer: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B.

    The formula is 6 N + 12 L T d. A multiply-add is two operations, and a backward pass costs two forward passes.
    Causal attention is counted in full. Activations recomputed to save memory are not counted.

    Args:
        parameters: N, the parameters in matrix products.
        layers: L.
        width: d, the model dimension.
        length: T, the sequence length in tokens.
    """
    return 6.0 * parameters + 12.0 * layers * length * width
