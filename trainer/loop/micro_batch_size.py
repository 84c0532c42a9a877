"""Find the largest micro-batch that fits into memory, by trying."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from trainer.data.loading.loader import Examples
from trainer.distributed import collectives
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.buffers import preserved_buffers
from trainer.optim.state import OptimizerState
from trainer.utils.oom import OutOfMemoryError
from trainer.utils.tensor_trees import take
from trainer.utils.trees import flatten

UNLIMITED = 1 << 62
HEADROOM = 8  # for every 8 examples there must be room for one more: each step fragments memory differently
PROBE_SIZE = 64  # rows and columns of the parameter with which an optimizer's state is measured


def find_micro_batch_size(state: TrainState) -> None:
    """Find the number of examples that a rank puts through the model at once, if it is `auto`. A collective.

    It is the largest power of two for which every rank has room, or a replica's whole share of a batch. It is part of
    the progress, so that a resumed run has the same. Gradients, buffers and random states are restored.

    Raises:
        OutOfMemoryError: on all ranks, if one of them has no room for a single example.
    """
    progress = state.progress
    if state.run.training.micro_batch_size != "auto":
        progress.micro_batch_size = None  # that was found before the user chose one
        return
    if progress.micro_batch_size is None:
        state.control.set_activity("looking for the largest micro-batch that fits into the memory")
        progress.micro_batch_size = _agree_on_size(state)
    state.trainer.micro_batch_size = progress.micro_batch_size


def _agree_on_size(state: TrainState) -> int:
    run = state.run
    share = max_replica_batch_size(run)
    found = _largest_fitting_size(state.trainer, share)
    # A rank that has room for its whole share does not limit the others, whose shares may be larger.
    limit = found if found < share else UNLIMITED
    negative, largest = collectives.all_reduce_max(torch.tensor([-limit, share])).tolist()
    if not negative:
        raise OutOfMemoryError(
            "micro_batch_size=auto: on one of the ranks there is no room in memory for a single example"
        )
    return min(-negative, largest)


def max_replica_batch_size(run: Run) -> int:
    """Return the largest number of examples of a batch that a replica of this silo gets."""
    largest = max(run.training_sizes)
    return max(1, -(-min(run.training.batch_size_of(largest), largest) // run.topology.num_replicas))


def _largest_fitting_size(trainer: LocalTrainer, share: int) -> int:
    """Return the largest power of two, or the share, for which this rank has room; 0 if there is none."""
    client = _largest_local_client(trainer.run)
    if client is None:
        return share
    ids = torch.from_numpy(trainer.run.training_sets[client])
    some = ids[torch.arange(_with_headroom(share)) % len(ids)]
    examples = next(trainer.client_batches(client).read(iter([(some, 0)])))
    sizes = [*(1 << power for power in range((share - 1).bit_length())), share]
    found = 0
    with _restoring_state(trainer), _reserve_optimizer_memory(trainer):
        for size in sizes:
            if not _fits(trainer, examples, _with_headroom(size)):
                # The failed trial has fragmented memory: a size that fitted before may not fit any longer.
                while found and not _fits(trainer, examples, _with_headroom(found)):
                    found //= 2
                break
            found = size
    return found


def _with_headroom(size: int) -> int:
    return size + size // HEADROOM


def _largest_local_client(run: Run) -> int | None:
    """Return the largest client whose examples this silo has, if there is one."""
    return max(run.training_homes[run.topology.silo], key=lambda client: run.training_sizes[client], default=None)


def _fits(trainer: LocalTrainer, examples: Examples, size: int) -> bool:
    try:
        trainer.step.try_forward_backward(*(take(part, slice(size)) for part in examples))
        return True
    except OutOfMemoryError:
        pass  # outside this block, with the error, the memory that it holds is freed
    _release_memory(trainer.run.topology.device)
    return False


@contextmanager
def _reserve_optimizer_memory(trainer: LocalTrainer) -> Iterator[None]:
    """Hold as much memory as the optimizer's state will take, and one vector more for communication."""
    vectors = optimizer_numbers_per_parameter(trainer.run) + 1
    filling = [torch.empty_like(parameter) for parameter in trainer.model.trainable for _ in range(vectors)]
    yield
    filling.clear()


def optimizer_numbers_per_parameter(run: Run) -> int:
    """Return how many numbers the optimizer keeps for each number of a parameter: 2 for AdamW, 0 for plain SGD."""
    tried = nn.Parameter(torch.zeros(PROBE_SIZE, PROBE_SIZE))
    tried.grad = torch.zeros_like(tried)
    optimizer = run.optimizer([("tried", tried)])
    state = OptimizerState(optimizer)
    optimizer.step()
    kept = flatten(state.state_dict()).values()
    return sum(value.numel() for value in kept if torch.is_tensor(value)) // tried.numel()


@contextmanager
def _restoring_state(trainer: LocalTrainer) -> Iterator[None]:
    """Restore what a pass through the model changes, and release the memory that it took."""
    states = [(generator, generator.get_state()) for generator in trainer.step.generators]
    with preserved_buffers(trainer.model.module):
        yield
    trainer.model.clear_gradients()
    for generator, before in states:
        generator.set_state(before)
    _release_memory(trainer.run.topology.device)


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
