"""Memory of a rank while it trains, by what holds it."""

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
RESET_PEAK = "5"  # written to Linux's clear_refs, makes the current resident size the peak

MemoryLines = dict[str, int]  # bytes by what holds them

PROCESS = "the process, PyTorch and the data set"  # on the host, whatever the device


def resident_bytes() -> int:
    """Return the resident memory of this process, without the allocator's reserve."""
    ctypes.CDLL(None).malloc_trim(0)
    return proc_status_bytes("VmRSS")


def peak_growth(device: torch.device, action: Callable[[], object]) -> int:
    """Return by how many bytes the peak of memory during an action exceeds the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes()
    with suppress(OSError):  # a kernel without it: the peak is then that of the whole process
        CLEAR_REFS.write_text(RESET_PEAK)
    action()
    return max(proc_status_bytes("VmHWM") - before, 0)


def memory_lines(
    state: TrainState, session: RoundSession, transport: NullTransport, clients: int, step: int, process: int
) -> MemoryLines:
    """Return the bytes that this rank holds in the middle of a round.

    Args:
        state: of the run.
        session: of the round, with a client's update in it.
        transport: that the session used.
        clients: number of clients that the silo trains in a round.
        step: growth of memory during a step.
        process: memory of the process before the run was built.
    """
    run, trainer, algorithm, module = state.run, state.trainer, state.algorithm, state.model.module
    seen: set[int] = set()
    sums = session.state_dict()
    updates = list(sums.pop("rows", {}).values())  # robust rules keep them, and a copy while they are reduced
    gradients = sum(parameter.nbytes for parameter in state.model.trainable)
    lines = {
        "parameters and buffers": _new_bytes([*module.parameters(), *module.buffers()], seen),
        "gradients": gradients,
        "client optimizer's state": _new_bytes(trainer.step.optimizer.state, seen),
        "global parameters": _new_bytes(algorithm.global_state(), seen),
        "average of the weights": _new_bytes(state.ema.vector if state.ema else None, seen),
        "server optimizer's state, of its shard": _new_bytes(algorithm.sharded_state_dict(), seen),
        "sums of the silo's clients": _new_bytes(sums, seen),
        "updates of all clients": transport.bytes_held + 2 * clients * _mean_bytes(updates),
        "states kept for clients": len(run.homes[run.topology.silo]) * _mean_bytes(trainer.clients.states.values()),
        "batch and activations": max(step - gradients, 0),
        PROCESS: process,
    }
    return {name: size for name, size in lines.items() if size}


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(branch)


def _new_bytes(tree: Any, seen: set[int]) -> int:
    """Return the size of a tree's storages that are not in `seen`, and add them to it."""
    total = 0
    for storage in (tensor.untyped_storage() for tensor in tensors_of(tree)):
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _mean_bytes(trees: Iterable[Any]) -> int:
    """Return the mean size of several trees, 0 for none."""
    sizes = [sum(tensor.nbytes for tensor in tensors_of(tree)) for tree in trees]
    return sum(sizes) // len(sizes) if sizes else 0
