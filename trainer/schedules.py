"""Learning-rate schedules: pure functions of a run's progress in [0, 1], so there is nothing to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """A factor of 1 at any progress."""

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up to 1 during the first `warmup` of the run, then half a cosine down to `final`.

    Both are fractions in [0, 1]. Loshchilov and Hutter 2017 (arXiv 1608.03983), one period.
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self):
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule.{name}={getattr(self, name)} is no fraction.\n  valid: 0 to 1")

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        rest = (progress - self.warmup) / max(1 - self.warmup, 1e-12)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))
