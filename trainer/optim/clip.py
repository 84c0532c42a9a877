"""How the gradient of a step is limited, after the mean over the silo: number by number, or by its norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm


@dataclass(frozen=True)
class GradientClipper:
    """Limits to the gradient of all parameters together; first those of single numbers, then that of the norm.

    Raises ValueError for an order of no norm.

    max_norm   the largest norm; None: any
    norm_type  of the norm: 1, 2 or infinity
    max_value  the largest magnitude of a single number; None: any
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    max_value: float | None = None

    def __post_init__(self):
        if self.max_norm is None and self.norm_type != 2:
            raise ValueError(
                f"clip.norm_type={self.norm_type:g} with clip.max_norm=null: nothing is clipped by a norm.\n"
                "  set clip.max_norm=1, or clip.norm_type=2"
            )

    def __call__(self, parameters: Sequence[nn.Parameter], measure: bool) -> Tensor | float:
        """The norm of the gradient, where it is limited by it or asked for: it costs a third of a small step.

        It is of what was there before; the gradient is then within the limits.
        """
        if self.max_norm is not None and self.max_value is None:
            return clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        norm = 0.0
        if measure:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = get_total_norm(gradients, self.norm_type)
        if self.max_value is not None:
            clip_grad_value_(parameters, self.max_value)
        if self.max_norm is not None:
            clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        return norm

    @property
    def settings(self) -> list[str]:
        """What limits, as it is typed; empty when nothing does."""
        limits = {"clip.max_norm": self.max_norm, "clip.max_value": self.max_value}
        return [f"{name}={limit:g}" for name, limit in limits.items() if limit is not None]
