"""An optimizer's step, without what torch does around it for those who watch, where nobody does.

Torch wraps the step of every optimizer, to name it to the profiler and to call hooks. That takes 35 to 90 microseconds
on a CPU, up to a tenth of a small model's step.
"""

from __future__ import annotations

from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def step(optimizer: Optimizer) -> None:
    """Steps the optimizer, to the same bits as `optimizer.step()`. Hooks are called, and the profiler is told."""
    around = type(optimizer).step
    within = getattr(around, "__wrapped__", None) if getattr(around, "hooked", False) else None
    if within is None or _has_hooks(optimizer):
        optimizer.step()
    else:
        within(optimizer)


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether a profiler runs, there are hooks, or the step of this one optimizer was replaced."""
    return bool(
        _profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in vars(optimizer)
    )
