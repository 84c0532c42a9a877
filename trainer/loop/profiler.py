"""A trace of a few steps, and of what was allocated on a GPU meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from trainer.loop.local_trainer import StepCallback

UNSEEN, WARM_UP, TRACED = 5, 2, 8  # steps: not looked at, looked at for nothing, traced
MAX_EVENTS = 100_000  # of the memory's history

TRACE, MEMORY = "trace.json.gz", "memory.pickle"


@contextmanager
def profile_steps(on_step: StepCallback, folder: Path, device: torch.device) -> Iterator[StepCallback]:
    """The watch, as one that also looks at some steps and writes what it saw into the folder.

    trace.json.gz   what was computed and sent, when and by which thread, for ui.perfetto.dev
    memory.pickle   what was allocated on the GPU, and by which line, for pytorch.org/memory_viz

    A run of fewer steps leaves a trace of those there were.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    steps = schedule(wait=UNSEEN, warmup=WARM_UP, active=TRACED, repeat=1)
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities, schedule=steps, on_trace_ready=lambda p: _write(p, folder, device)) as profiler:

        def told(done: float, examples: int, loss: Callable[[], float]) -> None:
            on_step(done, examples, loss)
            profiler.step()

        yield told


def _write(profiler: profile, folder: Path, device: torch.device) -> None:
    profiler.export_chrome_trace(str(folder / TRACE))
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(folder / MEMORY))
        torch.cuda.memory._record_memory_history(enabled=None)
