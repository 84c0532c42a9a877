"""The life of one worker: it learns its place and the configuration, builds the run, trains, and leaves in order.

A worker that was misconfigured says so, writes `bad_input` to state.json and ends well: torchrun would restart one that
failed, and report every rank. One that was told to leave writes `preempted`, and ends well too. `python -m trainer`
turns state.json into the exit code; where srun has started the workers, the code is their own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from trainer.checkpoint import Checkpoints, Disk, Start, find_disk
from trainer.checkpoint.format import DiskFull
from trainer.checkpoint.run_dir import FREE, RunFolder, Status
from trainer.commands.train.torch_settings import set_up
from trainer.config.build import build, build_sinks
from trainer.config.schema import Config, read_config
from trainer.data import describe
from trainer.distributed import collectives
from trainer.distributed.environment import Place, check_ranks, discover
from trainer.distributed.launch.heartbeat import Pulse, exit_at_once, heed_stop_signals
from trainer.distributed.topology import Topology, distributed, meet, restarts, share
from trainer.loggers import Console, Exhibits, JsonLines, Sink, TensorBoard, read_jsonl
from trainer.loop.control import Contact
from trainer.loop.fit import fit
from trainer.loop.profiler import profiled
from trainer.loop.run import Run
from trainer.loop.stopping import Diverged, Preempted
from trainer.loop.train_state import check_start
from trainer.models import describe_model
from trainer.utils.oom import OutOfMemory
from trainer.utils.trees import flatten

T = TypeVar("T")
Tree = dict[str, Any]

log = logging.getLogger("trainer")
log.addHandler(logging.NullHandler())  # until the run folder is known, failures are printed only

SECONDS_FOR_THE_CULPRIT = 3  # a rank that lost its peers lets the one that failed speak, and end the world, first
FRUITLESS_STARTS = 3  # so many starts in a row that come no further are not followed by another


class BadInput(Exception):
    """What the user has to change, known before anything was trained, and known to every rank."""


def main(compose: Callable[[], Tree]) -> Status:
    """Works until the run is finished, told to leave, or its input is found bad. A failure ends it with code 1.

    Rank 0 composes the configuration; the others get it, resolved.
    """
    place, worker = discover(), None
    try:
        store = meet(place)
        told = json.loads(share(store, "config", place, lambda: json.dumps(_composed(compose, place))))
        if "faults" in told:
            raise BadInput(told["faults"])
        worker = Worker(**told, place=place, store=store)
        with worker.topology() as topology:
            return worker.work(topology)
    except BadInput as error:
        if place.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return "bad_input"
    except BaseException as error:
        _fail(place, worker, error)


def _composed(compose: Callable[[], Tree], place: Place) -> dict[str, Any]:
    """The configuration, and the number of clients of the run that it goes on with; or what is wrong."""
    try:
        tree = compose()
        check_ranks(place, tree["launch"]["nproc_per_node"])
        clients = RunFolder(Path(tree["run_dir"])).clients()
    except ValueError as error:
        return {"faults": str(error)}
    if tree["clients"] == "auto" and clients:
        tree["clients"] = clients
    return {"tree": tree, "clients": clients}


class Worker:
    """One rank of a run from here to its end, in contact with its launcher and the other ranks."""

    def __init__(self, tree: Tree, clients: int | None, place: Place, store: Any):
        self.tree, self.clients, self.place, self.store = tree, clients, place, store
        self.config: Config = read_config(tree)
        set_up(self.config, place)
        self.folder = RunFolder(Path(str(self.config.run_dir)))
        self.contact = Contact(self.config.checkpoint.every_seconds, self.config.launch.max_seconds)
        self.pulse = Pulse(store.clone(), place.rank, self.contact.whereabouts)
        self.is_first = place.rank == 0
        self.disk: Disk

    @contextmanager
    def topology(self) -> Iterator[Topology]:
        """This rank's place in the world; while it lasts, signals are heeded and the heart beats."""
        launch = self.config.launch
        between = (launch.silo_timeout_seconds, launch.inter_silo_timeout_seconds, launch.inter_silo_backend)
        with ExitStack() as stack:
            stack.enter_context(heed_stop_signals(self.contact.leave, exit_at_once))
            stack.enter_context(self.pulse.beating(lambda: self.contact.is_leaving, self.contact.leave))
            where = (self.config.silos, self.place, self.store, launch.device)
            world = distributed(*where, *between, self.clients, launch.backend)
            try:
                topology = stack.enter_context(world)
            except ValueError as error:
                raise BadInput(str(error)) from error
            yield topology

    def work(self, topology: Topology) -> Status:
        """Trains to the end, or until told to leave; says how it went, also in state.json."""
        must_be_shared = self.config.require_shared_run_dir is True
        self.disk = _together(lambda: find_disk(self.folder.path, self.place, must_be_shared))
        _together(lambda: self.folder.open(self.tree, again=restarts() > 0) if self.writes else None)
        self.folder.start_log(topology.rank)
        if collectives.broadcast_text(
            "finished" if self.is_first and self.folder.has_finished(self.config.rounds) else ""
        ):
            if self.is_first:
                Console(self.config.rounds, self.folder.path).finish(self.folder.result(), Exhibits())
            return "finished"
        try:
            self._train(topology)
            status = "finished"
        except BadInput:
            self._say("bad_input")
            raise
        except Preempted:
            status = "preempted"
        self._say(status)
        collectives.barrier()  # a launcher reads it when the ranks of its own node have ended, be they the first
        return status

    @property
    def writes(self) -> bool:
        """Whether this rank writes what one rank has to on every disk."""
        return self.place.rank == self.disk.first

    def _say(self, status: Any, **facts: Any) -> None:
        if self.writes:
            self.folder.set_status(status, **facts)

    def _train(self, topology: Topology) -> None:
        run = _together(lambda: build(self.config, topology))
        self._say("running")
        if self.writes:
            self.folder.write_config({**self.tree, "clients": len(run.clients)})
        if self.is_first:
            introduce(run)
        if self.config.run.smoke:
            self._fit_or_skip(run, until=1)
            run = build(self.config, topology)
        result = self._fit_or_skip(run)
        if self.writes:
            self.folder.write_models()
            self.folder.write_result(result)

    def _fit_or_skip(self, run: Run, until: int | None = None) -> dict[str, Any]:
        """The result of the run; on_nonfinite_loss=skip leaves out batches after which the loss was not finite."""
        diverged = None
        while True:
            try:
                return self._fit(run, until, diverged)
            except Diverged as error:
                if error.window is None or self.config.on_nonfinite_loss == "stop":
                    raise
                diverged = error
            if self.is_first:
                print(f"{diverged}: goes back to the last checkpoint, and skips the batches since", flush=True)
            run = build(self.config, run.topology)

    def _fit(self, run: Run, until: int | None, diverged: Diverged | None) -> dict[str, Any]:
        """The result of the run, continued from its newest checkpoint if there is one."""
        keep = self.config.checkpoint.keep_last
        checkpoints = Checkpoints(self.folder.checkpoints, run.topology, run.layout, keep, self.disk)
        start = _together(lambda: checkpoints.newest() or self._from_elsewhere(run))
        _together(lambda: check_start(run, start, self.disk))
        self._begin_at(start)
        console = Console(run.rounds, self.folder.path, run.topology.num_silos)
        sinks = _together(lambda: self._sinks(console, start) if self.is_first else [])
        with ExitStack() as stack:
            for sink in sinks:
                stack.callback(sink.close)
            watch = console.step if self.is_first else None
            if watch and self.config.run.profile:
                watch = stack.enter_context(profiled(watch, self.folder.profile, run.topology.device))
            return fit(run, sinks, checkpoints, start, watch, until, self.contact, diverged)

    def _from_elsewhere(self, run: Run) -> Start | None:
        """The checkpoint of another run that resume= names, if it names one."""
        if self.config.resume in ("auto", "never"):
            return None
        elsewhere = RunFolder(Path(self.config.resume)).checkpoints
        return Checkpoints(elsewhere, run.topology, run.layout, disk=self.disk).newest()

    def _begin_at(self, start: Start | None) -> None:
        """Says where the run goes on; Diverged when the last starts have come no further."""
        place = start.place if start else "the beginning"
        fruitless = ""
        if self.is_first:
            for reason in start.passed if start else ():
                print(f"passed over: {reason}", file=sys.stderr, flush=True)
            if start:
                print(f"goes on from {place}", flush=True)
            if self.folder.count_start(place, restarts()) >= FRUITLESS_STARTS:
                fruitless = f"{FRUITLESS_STARTS} starts in a row came no further than {place}: not started again."
        if fruitless := collectives.broadcast_text(fruitless):
            raise Diverged(fruitless)

    def _sinks(self, console: Console, start: Start | None) -> list[Sink]:
        """Where rank 0 sends the metrics; what an earlier start wrote after the checkpoint is cut off."""
        rounds = start.reported if start else 0
        scalars = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in flatten(self.tree).items()
        }
        purge_round = rounds + 1 if start else None
        compared = {key: value for key, value in scalars.items() if not key.startswith(FREE)}
        board = TensorBoard(self.folder.tensorboard, compared, purge_round, partial(read_jsonl, self.folder.metrics))
        others = build_sinks(self.config, self.folder.path, scalars)
        return [JsonLines(self.folder.metrics, rounds), board, *others, console]


def _together(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, if it raised no ValueError on any; else BadInput with all that were raised."""
    made, fault = None, ""
    try:
        made = make()
    except ValueError as error:
        fault = str(error)
    faults = [text for text in collectives.gather_texts(fault) if text]
    if faults:
        raise BadInput("\n".join(dict.fromkeys(faults)))
    return made  # pyright: ignore[reportReturnType] (without a fault it was made)


def introduce(run: Run) -> None:
    """Prints who trains what on what."""
    topology, clients = run.topology, run.clients
    examples = [sum(map(len, ids)) for ids in (clients.train, clients.validation, clients.test)]
    sizes = ",".join(map(str, topology.silo_sizes))
    print(
        f"workers   {topology.world_size} on {topology.device.type}, threads each: {torch.get_num_threads()}; "
        f"replicas in the silos: [{sizes}]\n"
        f"model     {describe_model(run.module)}\n"
        f"examples  {examples[0]:,} to train, {examples[1]:,} to validate, {examples[2]:,} to test\n"
        f"clients   {len(clients)}",
        flush=True,
    )
    if run.per_client == "full" and len(clients) > 1:
        print(describe(clients, run.data.train, run.data.label_names), flush=True)


def _fail(place: Place, worker: Worker | None, error: BaseException) -> NoReturn:
    """Says why this rank failed, and ends the process at once: its peers may be waiting in a collective."""
    if isinstance(error, KeyboardInterrupt):
        os._exit(130)
    log.error("failed", exc_info=error)
    folder = worker.folder if worker else None
    if isinstance(error, Diverged):  # known to every rank
        if worker and worker.is_first:
            worker.folder.set_status("crashed", error=str(error), final=True)
            print(error, file=sys.stderr, flush=True)
        time.sleep(0 if place.rank == 0 else SECONDS_FOR_THE_CULPRIT)
        os._exit(1)
    said = _account(place, worker, error)
    status = "bad_input" if isinstance(error, OutOfMemory) else "crashed"
    if folder and folder.path.exists() and folder.claim_failure("run"):
        folder.set_status(status, rank=place.rank, error=f"{type(error).__name__}: {error}")
    if folder and not folder.claim_failure(f"node-{place.node}"):
        time.sleep(SECONDS_FOR_THE_CULPRIT)
        os._exit(1)
    print(said, file=sys.stderr, flush=True)
    os._exit(1)


def _account(place: Place, worker: Worker | None, error: BaseException) -> str:
    """What is said of a failure. Who lost a peer waits for that one to speak first."""
    if worker and collectives.has_timed_out(error):
        doing = worker.pulse.of_all(place.world_size)
        return f"rank {place.rank} waited in vain while {worker.contact.whereabouts()}:\n{doing}"
    if collectives.has_lost_peers(error):
        time.sleep(SECONDS_FOR_THE_CULPRIT)
        return f"rank {place.rank} lost its peers: {str(error).splitlines()[0]}"
    if isinstance(error, OutOfMemory):
        return f"rank {place.rank}: {error}"
    if isinstance(error, DiskFull):
        return f"rank {place.rank}: {error.strerror}"
    return f"rank {place.rank} failed:\n{''.join(traceback.format_exception(error))}"
