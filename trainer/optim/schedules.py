"""Learning-rate schedules: pure functions of a run's progress in [0, 1], so there is nothing to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """A factor of 1 at any progress."""

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Decay:
    """Linear warm-up to 1 in the first `warmup_fraction` of the run, then a curve down to `final_lr_fraction`."""

    warmup_fraction: float = 0.0
    final_lr_fraction: float = 0.0

    def __post_init__(self):
        _check_fractions(warmup_fraction=self.warmup_fraction, final_lr_fraction=self.final_lr_fraction)

    def __call__(self, progress: float) -> float:
        if progress < self.warmup_fraction:
            return progress / self.warmup_fraction
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * self._curve(
            _part(progress, self.warmup_fraction, 1.0)
        )

    def _curve(self, part: float) -> float:
        """From 1 at part 0 to 0 at part 1."""
        raise NotImplementedError


class Cosine(_Decay):
    """Linear warm-up to 1 in the first `warmup_fraction` of the run, then half a cosine down to `final_lr_fraction`.

    Both are fractions in [0, 1]. Loshchilov and Hutter 2017 (arXiv 1608.03983), one period.
    """

    def _curve(self, part: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * part))


class Linear(_Decay):
    """Linear warm-up to 1 in the first `warmup_fraction` of the run, then a line down to `final_lr_fraction`.

    Both are fractions in [0, 1].
    """

    def _curve(self, part: float) -> float:
        return 1 - part


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up to 1, then 1, then a line down to `final_lr_fraction`.

    The warm-up is the first `warmup_fraction` of the run, the line its last `decay`. All are
    fractions in [0, 1], and warm-up and decay no more than 1 together. Hu et al. 2024 (arXiv 2404.06395).
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
        return 1 - (1 - self.final_lr_fraction) * _part(progress, 1 - self.decay, 1.0)


@dataclass(frozen=True)
class Step:
    """1, times `factor` from each of the `milestones` on, which are fractions of the run. He et al. 2016."""

    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self):
        _check_fractions(factor=self.factor, **{f"milestones[{i}]": place for i, place in enumerate(self.milestones)})

    def __call__(self, progress: float) -> float:
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)


def _part(progress: float, start: float, end: float) -> float:
    """How much of [start, end] is done: 0 before, 1 after."""
    return min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{name}={value} is no fraction.\n  valid: 0 to 1")
