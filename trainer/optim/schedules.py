"""Learning-rate schedules, which map the progress of a run, in [0, 1], to a factor on the learning rate.

Schedules are pure functions, so checkpoints need no state of them. A class or function whose factor is the same at any
progress states that by the attribute `is_constant = True`; a run with it may be resumed with more rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """A constant factor of 1."""

    is_constant: ClassVar[bool] = True

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Decay:
    """Linear warmup to 1 over the first `warmup_fraction` of the run, then a decay to `final_lr_fraction`."""

    warmup_fraction: float = 0.0
    final_lr_fraction: float = 0.0

    def __post_init__(self):
        _check_fractions(warmup_fraction=self.warmup_fraction, final_lr_fraction=self.final_lr_fraction)

    def __call__(self, progress: float) -> float:
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        decayed = self._decay(_fraction(progress, self.warmup_fraction, 1.0))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * decayed

    def _decay(self, fraction: float) -> float:
        """Decay from 1 at fraction 0 to 0 at fraction 1."""
        raise NotImplementedError


class Cosine(_Decay):
    """Linear warmup to 1 over the first `warmup_fraction` of the run, then a half cosine to `final_lr_fraction`.

    Both are in [0, 1]. Loshchilov and Hutter 2017 (arXiv 1608.03983), one period.
    """

    def _decay(self, fraction: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * fraction))


class Linear(_Decay):
    """Linear warmup to 1 over the first `warmup_fraction` of the run, then a linear decay to `final_lr_fraction`.

    Both are in [0, 1].
    """

    def _decay(self, fraction: float) -> float:
        return 1 - fraction


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warmup to 1, a constant phase, and a linear decay to `final_lr_fraction`.

    Warmup takes the first `warmup_fraction` of the run, the decay the last `decay`. All are in [0, 1]; warmup and decay
    take at most 1 together. Hu et al. 2024 (arXiv 2404.06395).
    """

    warmup_fraction: float = 0.0
    decay: float = 0.2
    final_lr_fraction: float = 0.0

    def __post_init__(self):
        _check_fractions(
            warmup_fraction=self.warmup_fraction, decay=self.decay, final_lr_fraction=self.final_lr_fraction
        )
        if self.warmup_fraction + self.decay > 1:
            raise ValueError(
                f"schedule.warmup_fraction={self.warmup_fraction} and schedule.decay={self.decay} are longer "
                "than the run.\n"
                "  valid: no more than 1 together"
            )

    def __call__(self, progress: float) -> float:
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        return 1 - (1 - self.final_lr_fraction) * _fraction(progress, 1 - self.decay, 1.0)


@dataclass(frozen=True)
class Step:
    """Start at 1, and multiply by `factor` at each of the `milestones`, fractions of the run. He et al. 2016."""

    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self):
        _check_fractions(
            factor=self.factor, **{f"milestones[{i}]": milestone for i, milestone in enumerate(self.milestones)}
        )

    def __call__(self, progress: float) -> float:
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)


def _fraction(progress: float, start: float, end: float) -> float:
    """Return how much of [start, end] is done: 0 before, 1 after."""
    return min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{name}={value} is not a fraction.\n  valid: 0 to 1")
