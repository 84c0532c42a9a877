"""Profiling: a trace of a few steps, and of GPU memory allocations during them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.loop.local_trainer import StepCallback
from trainer.utils.disk import naming_disk

UNSEEN, WARM_UP, TRACED = 5, 2, 8  # steps: skipped, profiled without a record, traced
MAX_EVENTS = 100_000  # of the memory's history

TRACE, MEMORY = "trace.json.gz", "memory.pickle"


@contextmanager
def profile_steps(on_step: StepCallback, folder: Path, device: torch.device) -> Iterator[StepCallback]:
    """Wrap a step callback so that some steps are profiled. A shorter run leaves a trace of the steps that it made.

    Args:
        on_step: the callback.
        folder: gets trace.json.gz, operations by thread for ui.perfetto.dev, and on a GPU memory.pickle, allocations by
            line for pytorch.org/memory_viz.
        device: of the training.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    steps = schedule(wait=UNSEEN, warmup=WARM_UP, active=TRACED, repeat=1)
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    with naming_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, schedule=steps, on_trace_ready=lambda p: _write(p, folder, device)) as profiler:

        def profiled(done: float, examples: int, loss: Callable[[], float]) -> None:
            on_step(done, examples, loss)
            profiler.step()

        yield profiled


def _write(profiler: profile, folder: Path, device: torch.device) -> None:
    with naming_disk(folder):
        profiler.export_chrome_trace(str(folder / TRACE))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(folder / MEMORY))
        torch.cuda.memory._record_memory_history(enabled=None)
