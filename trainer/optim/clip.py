"""Clipping of the gradient of a step, after it is averaged over the silo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

# From the norm of this rank's part of a gradient, and its order, to the norm of the whole.
NormOverParts = Callable[[Tensor, float], Tensor]


def _as_it_is(norm: Tensor, order: float) -> Tensor:
    return norm


@dataclass(frozen=True)
class GradientClipper:
    """Clips the gradient of all parameters, first by value, then by norm.

    max_norm: largest norm of the gradient; None does not clip by norm.
    norm_type: p of the p-norm: 1, 2 or infinity.
    max_value: largest magnitude of a single element; None does not clip by value.

    Raises:
        ValueError: norm_type is set without max_norm.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    max_value: float | None = None

    def __post_init__(self):
        if self.max_norm is None and self.norm_type != 2:
            raise ValueError(
                f"clip.norm_type={self.norm_type:g} with clip.max_norm=null: nothing is clipped by norm.\n"
                "  set clip.max_norm=1, or clip.norm_type=2"
            )

    def __call__(
        self,
        parameters: Sequence[nn.Parameter],
        measure: bool,
        over_parts: NormOverParts = _as_it_is,
        counted: Sequence[nn.Parameter] | None = None,
    ) -> Tensor | float:
        """Clip the gradients in place.

        Args:
            parameters: those whose `grad` is clipped.
            measure: whether to compute the norm even if nothing is clipped by it, which costs a third of a small
                model's step.
            over_parts: makes the norm of the whole model, where the parameters are a part of it.
            counted: those that the norm of this part counts, where parts have some in common; None: all.

        Returns:
            The norm before clipping, or 0.0 if it was not computed.
        """
        norm, counted = 0.0, parameters if counted is None else counted
        if measure or (self.max_norm is not None and self.max_value is None):
            norm = self._norm(counted, over_parts)
        if self.max_value is not None:
            clip_grad_value_(parameters, self.max_value)
        if self.max_norm is not None:
            limited = norm if self.max_value is None else self._norm(counted, over_parts)
            assert isinstance(limited, Tensor)
            clip_grads_with_norm_(parameters, self.max_norm, limited)
        return norm

    def _norm(self, parameters: Sequence[nn.Parameter], over_parts: NormOverParts) -> Tensor:
        gradients = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
        return over_parts(get_total_norm([each for each in gradients if each.numel()], self.norm_type), self.norm_type)

    @property
    def settings(self) -> list[str]:
        """The limits in the syntax of the command line; empty if nothing is clipped."""
        limits = {"clip.max_norm": self.max_norm, "clip.max_value": self.max_value}
        return [f"{name}={limit:g}" for name, limit in limits.items() if limit is not None]


def _values(gradient: Tensor) -> Tensor:
    """Return the elements of a gradient that are not left out as zeros."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
