"""What a rank holds in memory while it trains, line by line."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.algorithms.base import RoundSession
from trainer.commands.plan.null_transport import NullTransport
from trainer.loop.train_state import TrainState
from trainer.utils.hardware import proc_status_bytes

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of Linux's clear_refs: the peak is what there is now

MemoryLines = dict[str, int]  # what it is, and its bytes

PROCESS = "the process, PyTorch and the data set"  # on the host, whatever the device


def resident_bytes() -> int:
    """The bytes of memory that this process holds, when it has given back what it does not use."""
    ctypes.CDLL(None).malloc_trim(0)
    return proc_status_bytes("VmRSS")


def peak_growth(device: torch.device, action: Callable[[], object]) -> int:
    """The bytes by which the memory in use was larger than before, at most, while the action went on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()
    with suppress(OSError):  # a kernel that cannot: the peak is that since the process began
        CLEAR_REFS.write_text(RESET_PEAK)
    action()
    return max(proc_status_bytes("VmHWM") - before, 0)


def memory_lines(
    state: TrainState, session: RoundSession, wire: NullTransport, clients: int, step: int, process: int
) -> MemoryLines:
    """The bytes of what this rank holds, in the middle of a round in which its silo trains so many clients.

    step: by which the memory grew in a step. process: what it held before the run was made.
    """
    run, trainer, algorithm = state.run, state.trainer, state.algorithm
    seen: set[int] = set()
    global_state, sums = algorithm.global_state(), session.state_dict()
    rows = list(sums.pop("rows", {}).values())
    gradients = sum(parameter.nbytes for parameter in state.model.trainable)
    lines = {
        "parameters and buffers": _new([*run.module.parameters(), *run.module.buffers()], seen),
        "gradients": gradients,
        "inner optimizer's state": _new(tensors_of(trainer.step.optimizer.state), seen),
        "global parameters": _new([global_state.pop("parameters")], seen),
        "average of the weights": _new([state.ema.vector] if state.ema else [], seen),
        "server optimizer's state, of its slice": _new(tensors_of(algorithm.sharded_state_dict()), seen),
        "sums of the silo's clients": _new(tensors_of(sums), seen),
        "deltas of all clients": wire.bytes_held + 2 * clients * _each(rows),
        "the algorithm's own": _new(tensors_of(global_state), seen),
        "states kept for clients": len(run.homes[run.topology.silo]) * _each(trainer.clients.states.values()),
        "batch and activations": max(step - gradients, 0),
        PROCESS: process,
    }
    return {name: size for name, size in lines.items() if size}


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in mappings and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(branch)


def _new(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """The bytes of the memory under these tensors that was not seen yet."""
    total = 0
    for storage in (tensor.untyped_storage() for tensor in tensors):
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _each(trees: Iterable[Any]) -> int:
    """The mean bytes of one of these."""
    sizes = [sum(tensor.nbytes for tensor in tensors_of(tree)) for tree in trees]
    return sum(sizes) // len(sizes) if sizes else 0
