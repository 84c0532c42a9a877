"""How many operations a model's training takes: what its speed is compared with that of the chip by."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class SupportsFlops(Protocol):
    """A model that knows what a token costs. Any module with this method has the figure `mfu`."""

    def flops_per_token(self, length: int) -> float:
        """Operations of a forward and a backward pass over a sequence of `length` tokens, for each of them."""
        ...


def transformer_flops(parameters: int, layers: int, width: int, length: int) -> float:
    """6 N + 12 L T d: Chowdhery et al. 2022 (arXiv 2204.02311), appendix B.

    An addition and a multiplication are two operations; a backward pass takes two forward ones. N are the `parameters`
    of matrix products. Attention is counted whole, though half of a causal one need not be computed, and so is nothing
    that is computed a second time to save memory.
    """
    return 6.0 * parameters + 12.0 * layers * length * width
