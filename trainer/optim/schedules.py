"""Learning-rate schedules, which map the progress of a run, in [0, 1], to a factor on the learning rate.

Schedules are pure functions, so checkpoints need no state of them. A class or function whose factor is the same at any
progress states that by the attribute `is_constant = True`; a run with it may be resumed with more rounds. One that also
moves the optimizer's momentum has a method `momentum`, which maps the progress to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.utils.errors import InputError

if TYPE_CHECKING:
    import torch

Schedule = Callable[[float], float]


class Scheduler:
    """Sets the learning rates of an optimizer, and its momentum if the schedule has one, by the progress of the run.

    Args:
        optimizer: as it is made: its learning rates are those that the schedule multiplies.
        schedule: the schedule.

    Attributes:
        factor: on the learning rates now. The state of an optimizer has its rates, so a checkpoint has this beside it.

    Raises:
        InputError: the schedule moves a momentum, and the optimizer has none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule):
        self.optimizer, self.schedule, self.factor = optimizer, schedule, 1.0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.momentum: Callable[[float], float] | None = momentum_of(schedule)
        if self.momentum and not any(map(_momentum_key, optimizer.param_groups)):
            raise InputError(
                f"schedule={type(schedule).__name__} moves the momentum, and optimizer={type(optimizer).__name__} has "
                "none.\n  set schedule.max_momentum=null schedule.base_momentum=null, or optimizer=momentum or adamw"
            )

    def set_progress(self, progress: float) -> None:
        """Set the learning rates, and the momentum, to those of this fraction of the run, in [0, 1]."""
        factor = self.schedule(progress)
        if factor != self.factor:
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * factor
            self.factor = factor
        if self.momentum:
            momentum = self.momentum(progress)
            for group in self.optimizer.param_groups:
                if key := _momentum_key(group):
                    group[key] = momentum if key == "momentum" else (momentum, *group[key][1:])


def momentum_of(schedule: Schedule) -> Callable[[float], float] | None:
    """Return the function by which a schedule moves the momentum; None if it leaves that as it is."""
    return getattr(schedule, "momentum", None)


def _momentum_key(group: dict[str, Any]) -> str:
    """Return the option of a group that is its momentum, of which Adam's is the first of `betas`; empty for none."""
    return next((key for key in ("betas", "momentum") if key in group), "")


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
class CosineRestarts(_Decay):
    """Linear warmup to 1, then half cosines to `final_lr_fraction`, each from 1 again.

    Loshchilov and Hutter 2017 (arXiv 1608.03983). `cycles` of them follow each other, each `cycle_factor` times as long
    as the one before: torch's CosineAnnealingWarmRestarts, whose T_mult this is, and whose T_0 follows from `cycles`.
    """

    cycles: int = 4
    cycle_factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.cycles < 1 or self.cycle_factor < 1:
            raise ValueError(
                f"schedule.cycles={self.cycles} and schedule.cycle_factor={self.cycle_factor}\n  valid: both from 1"
            )

    def _decay(self, fraction: float) -> float:
        lengths = [self.cycle_factor**cycle for cycle in range(self.cycles)]
        position, start = fraction * sum(lengths), 0.0
        for length in lengths[:-1]:
            if position < start + length - 1e-9:  # a step at a restart belongs to the next cycle, also when rounded
                break
            start += length
        else:
            length = lengths[-1]
        return 0.5 * (1 + math.cos(math.pi * max(position - start, 0.0) / length))


@dataclass(frozen=True)
class OneCycle:
    """A half cosine from `initial_lr_fraction` to 1 over the first `warmup_fraction` of the run, then to the final one.

    Smith and Topin 2018 (arXiv 1708.07120). The momentum goes the other way, from `max_momentum` to `base_momentum` and
    back; with None it stays as the optimizer has it. These are torch's OneCycleLR and its defaults: `warmup_fraction`
    is pct_start, `initial_lr_fraction` 1 / div_factor, and `final_lr_fraction` 1 / (div_factor * final_div_factor).
    Torch reaches both turning points one step earlier, because it divides by the number of steps minus 1.
    """

    warmup_fraction: float = 0.3
    initial_lr_fraction: float = 0.04
    final_lr_fraction: float = 4e-6
    base_momentum: float | None = 0.85
    max_momentum: float | None = 0.95

    def __post_init__(self):
        momenta = {"base_momentum": self.base_momentum, "max_momentum": self.max_momentum}
        given = {name: value for name, value in momenta.items() if value is not None}
        _check_fractions(
            warmup_fraction=self.warmup_fraction,
            initial_lr_fraction=self.initial_lr_fraction,
            final_lr_fraction=self.final_lr_fraction,
            **given,
        )
        if len(given) == 1:
            raise ValueError(
                f"schedule.base_momentum={self.base_momentum} and schedule.max_momentum={self.max_momentum}\n"
                "  valid: two numbers from 0 to 1, or null for both"
            )

    def __call__(self, progress: float) -> float:
        return self._anneal(progress, self.initial_lr_fraction, 1.0, self.final_lr_fraction)

    @property
    def momentum(self) -> Callable[[float], float] | None:
        """The momentum by progress; None if the optimizer keeps its own."""
        low, high = self.base_momentum, self.max_momentum
        if low is None or high is None:
            return None
        return lambda progress: self._anneal(progress, high, low, high)

    def _anneal(self, progress: float, start: float, middle: float, end: float) -> float:
        if progress < self.warmup_fraction:
            return _half_cosine(start, middle, progress / self.warmup_fraction)
        return _half_cosine(middle, end, _fraction(progress, self.warmup_fraction, 1.0))


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


def _half_cosine(start: float, end: float, fraction: float) -> float:
    """Return where a half cosine from `start` to `end` is at this fraction of its way."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def _fraction(progress: float, start: float, end: float) -> float:
    """Return how much of [start, end] is done: 0 before, 1 after."""
    return min(max((progress - start) / max(end - start, 1e-12), 0.0), 1.0)


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"schedule.{name}={value} is not a fraction.\n  valid: 0 to 1")
