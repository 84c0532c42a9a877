"""How the gradient of a step is limited, after the mean over the silo: number by number, or by its norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm


@dataclass(frozen=True)
class Clip:
    """Limits to the gradient of all parameters together; first those of single numbers, then that of the norm.

    Raises ValueError for an order of no norm.

    norm    the largest norm; None: any
    order   of the norm: 1, 2 or infinity
    value   the largest magnitude of a single number; None: any
    """

    norm: float | None = None
    order: float = 2.0
    value: float | None = None

    def __post_init__(self):
        if self.norm is None and self.order != 2:
            raise ValueError(
                f"clip_norm_order={self.order:g} with clip_norm=null: nothing is clipped by a norm.\n"
                "  set clip_norm=1, or clip_norm_order=2"
            )

    def __call__(self, parameters: Sequence[nn.Parameter], measure: bool) -> Tensor | float:
        """The norm of the gradient, where it is limited by it or asked for: it costs a third of a small step.

        It is of what was there before; the gradient is then within the limits.
        """
        if self.norm is not None and self.value is None:
            return clip_grad_norm_(parameters, self.norm, self.order)
        norm = 0.0
        if measure:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = get_total_norm(gradients, self.order)
        if self.value is not None:
            clip_grad_value_(parameters, self.value)
        if self.norm is not None:
            clip_grad_norm_(parameters, self.norm, self.order)
        return norm

    @property
    def settings(self) -> list[str]:
        """What limits, as it is typed; empty when nothing does."""
        limits = {"clip_norm": self.norm, "clip_value": self.value}
        return [f"{name}={limit:g}" for name, limit in limits.items() if limit is not None]
