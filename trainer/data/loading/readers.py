"""Readers fetch the batches of a source, one after the other: in this process, or in workers of torch's DataLoader."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from threading import Thread, Timer
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.sources.base import Source, fetch_by_seed
from trainer.data.sources.padding import joiner
from trainer.data.sources.torch_datasets import is_read_by_batch
from trainer.distributed.launch.signals import stop_signals_blocked
from trainer.utils.errors import InputError
from trainer.utils.tensor_trees import Tree, map_tensors
from trainer.utils.user_code import RemoteTraceback, user_location

Examples = tuple[Tree, Tree]
Request = tuple[Tensor, int]  # the ids of a batch, and the seed of what the source draws for each of them

PRELOADED = ["trainer.data.loading.readers"]  # imported once, in the server that workers are forked from
QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
SECONDS_TO_END = 1.0  # for a worker in the middle of a batch that nobody waits for


@dataclass(frozen=True)
class LoadingOptions:
    """How the items of torch Datasets are read, with the names that torch's DataLoader has for them.

    Attributes:
        workers: processes of each rank that read; 0: the rank reads for itself.
        prefetch_factor: batches that each worker reads ahead.
        pin_memory: whether batches are put into pinned memory; auto: if a GPU trains.
        persistent_workers: whether workers stay from client to client and round to round.
    """

    workers: int = 0
    prefetch_factor: int = 2
    pin_memory: bool | Literal["auto"] = "auto"
    persistent_workers: bool = True


class Reader:
    """Reads in this process, each batch when it is needed."""

    def read(self, source: Source, requests: Iterable[Request], is_split: bool = False) -> Iterator[Examples]:
        """Yield the examples of each request, in order.

        Args:
            source: one of the sources of the run.
            requests: what to read; taken in advance by as many as are read ahead.
            is_split: whether several workers may share a request.
        """
        return (fetch_by_seed(source, ids, seed) for ids, seed in requests)

    def close(self) -> None:
        """End the workers."""


class WorkerReader(Reader):
    """Reads what is slow, such as the items of a Dataset, in workers of torch's DataLoader.

    Workers are forked from a server of Python's (`forkserver`) that has no threads, sockets or GPU, never from this
    process. They do not see stop signals, which are this process's to act on, and end when it does, however it ends.
    What an example draws at random depends on its seed alone, so it is the same in any worker.

    Args:
        sources: those of the run.
        options: how to read.
        device: that trains.
    """

    def __init__(self, sources: Sequence[Source], options: LoadingOptions, device: torch.device):
        self.sources, self.options = sources, options
        self.sampler = _Requests()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # It comes twice a rank, and workers that wait for a disk or a network may well outnumber the cores.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        self.loader: DataLoader[Any] = DataLoader(
            _Reads(sources),
            sampler=self.sampler,
            batch_size=None,  # the sampler gives whole batches
            collate_fn=_unchanged,
            num_workers=options.workers,
            prefetch_factor=options.prefetch_factor,
            pin_memory=device.type == "cuda" if options.pin_memory == "auto" else options.pin_memory,
            persistent_workers=options.persistent_workers,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default one is the model's
        )
        self.iterator: Any = None

    def read(self, source: Source, requests: Iterable[Request], is_split: bool = False) -> Iterator[Examples]:
        if not is_read_by_batch(source):
            yield from super().read(source, requests)
            return
        position, join = self.sources.index(source), joiner(source)
        parts = self.options.workers if is_split and join else 1
        whole, ahead = tee((ids.split(-(-len(ids) // parts)), seed) for ids, seed in requests)
        self.sampler.requests = ((position, ids.tolist(), seed) for parts, seed in ahead for ids in parts)
        results = self._results()
        for ids, _ in whole:
            examples = [next(results).unwrap() for _ in ids]
            yield join(examples) if join and len(examples) > 1 else examples[0]

    def close(self) -> None:
        iterator, self.iterator = self.iterator, None
        if iterator is None:
            return
        atexit.unregister(self.close)
        impatient = Timer(SECONDS_TO_END, lambda: [worker.kill() for worker in iterator._workers])
        impatient.start()
        iterator._shutdown_workers()
        impatient.cancel()

    def _results(self) -> Iterator[_Examples | _Failure]:
        """Start to read what the sampler has, and yield what the workers have read."""
        try:
            yield from self._start()
        except (EOFError, OSError, RuntimeError) as error:
            if not self._has_lost_workers():
                raise
            raise RuntimeError(
                f"data.workers={self.options.workers}: a worker that reads the data has died: {error}\n"
                "  it may have been killed because memory or /dev/shm ran out: set data.workers or "
                "data.prefetch_factor lower"
            ) from error

    def _has_lost_workers(self) -> bool:
        """Return whether a worker is gone; those that have just been killed take a moment."""
        workers = self.iterator._workers if self.iterator is not None else []
        return bool(wait([worker.sentinel for worker in workers], SECONDS_TO_END)) if workers else False

    def _start(self) -> Iterator[Any]:
        """Begin to read; start the workers unless they are there."""
        if not self.options.persistent_workers:
            self.close()
        if self.iterator is None:
            atexit.register(self.close)  # before multiprocessing waits for its children to end
        _start_resource_tracker()  # here, because it unblocks signals
        try:
            with stop_signals_blocked():
                self.iterator = iter(self.loader)
        except Exception as error:
            if self.iterator is not None:
                raise
            datasets = ", ".join(dict.fromkeys(map(_dataset_name, self.sources)))
            reason = str(error.__context__ or error).splitlines()[0]  # torch puts advice around it
            raise InputError(
                f"data.workers={self.options.workers}: {datasets} cannot be sent to another process: {reason}\n"
                "  open files in __getitem__, and keep no lambda, generator or lock; or set data.workers=0"
            ) from error
        return self.iterator


def make_reader(sources: Sequence[Source], options: LoadingOptions, device: torch.device) -> Reader:
    """Make the reader of a run."""
    return WorkerReader(sources, options, device) if options.workers else Reader()


def check_loading(sources: Sequence[Source], options: LoadingOptions) -> None:
    """Raise ValueError if there are to be workers, and nothing for them to read."""
    if options.workers and not any(map(is_read_by_batch, sources)):
        kinds = ", ".join(dict.fromkeys(type(source).__name__ for source in sources))
        raise ValueError(
            f"data.workers={options.workers}, but the examples are in memory ({kinds}), where they are fetched faster "
            "than workers could send them.\n  set data.workers=0; workers read the items of torch Datasets"
        )


class _Requests:
    """The sampler of a DataLoader, with other requests each time it is iterated over."""

    requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


class _Reads(Dataset[Any]):
    """Reads a request in a worker. An error is returned, so that it has the place where it was raised."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = [source if is_read_by_batch(source) else None for source in sources]

    def __getitem__(self, request: tuple[int, list[int], int]) -> Any:
        position, ids, seed = request
        source = self.sources[position]
        assert source
        try:
            return _Examples(fetch_by_seed(source, torch.tensor(ids), seed))
        except Exception as error:
            return _Failure.of(error)


@dataclass
class _Examples:
    """The examples that a worker has read."""

    examples: Examples

    def pin_memory(self) -> _Examples:  # torch calls it
        return _Examples(map_tensors(torch.Tensor.pin_memory, self.examples))

    def unwrap(self) -> Examples:
        return self.examples


@dataclass
class _Failure:
    """An error in a worker, on its way to the rank."""

    error: Exception
    cause: RemoteTraceback

    @staticmethod
    def of(error: Exception) -> _Failure:
        cause = RemoteTraceback(traceback.format_exc(), user_location(error))
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))  # pyright: ignore[reportAttributeAccessIssue]
        except Exception:  # of errors that take other arguments than their message, or hold what cannot be sent
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return _Failure(error, cause)

    def unwrap(self) -> NoReturn:
        raise self.error from self.cause


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()


def _start_resource_tracker() -> None:
    """Start Python's process that cleans up after this one; it is not to warn of what a rank leaves that is killed."""
    sys.warnoptions.append(QUIET_TRACKER)  # it is started with the same options
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(QUIET_TRACKER)


def _end_with_parent() -> None:
    """End this worker when its rank is gone; torch looks at the server's process instead, which stays."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(os.EX_TEMPFAIL)


def _dataset_name(source: Any) -> str:
    return type(getattr(source, "dataset", source)).__name__
