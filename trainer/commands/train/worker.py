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
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from trainer.checkpoint import Checkpointer, ResumePoint, SharedStorage, detect_shared_storage
from trainer.checkpoint.format import DiskFullError
from trainer.checkpoint.run_dir import CHANGEABLE_KEYS, RunDir, Status
from trainer.commands.train.torch_settings import configure_torch
from trainer.config.build import build, build_loggers
from trainer.config.schema import Config, read_config
from trainer.data import describe
from trainer.distributed import collectives
from trainer.distributed.environment import ClusterEnvironment, check_ranks, detect_environment
from trainer.distributed.launch.heartbeat import Heartbeat
from trainer.distributed.launch.signals import handle_stop_signals, hard_exit
from trainer.distributed.topology import Topology, broadcast_via_store, distributed, open_store, restart_count
from trainer.loggers import ConsoleLogger, FinalArtifacts, JsonLinesLogger, Logger, TensorBoardLogger
from trainer.loop.checkpointing import validate_resume
from trainer.loop.control import LoopControl
from trainer.loop.fit import fit
from trainer.loop.profiler import profile_steps
from trainer.loop.run import Run
from trainer.loop.stopping import DivergedError, Preempted
from trainer.models import describe_model
from trainer.utils.oom import OutOfMemoryError
from trainer.utils.trees import flatten

T = TypeVar("T")
Tree = dict[str, Any]

log = logging.getLogger("trainer")
log.addHandler(logging.NullHandler())  # until the run folder is known, failures are printed only

ROOT_CAUSE_GRACE_SECONDS = 3  # a rank that lost its peers lets the one that failed speak, and end the world, first
MAX_STARTS_WITHOUT_PROGRESS = 3  # so many starts in a row that come no further are not followed by another


class UserInputError(Exception):
    """What the user has to change, known before anything was trained, and known to every rank."""


def main(compose: Callable[[], Tree]) -> Status:
    """Works until the run is finished, told to leave, or its input is found bad. A failure ends it with code 1.

    Rank 0 composes the configuration; the others get it, resolved.
    """
    place, worker = detect_environment(), None
    try:
        store = open_store(place)
        told = json.loads(broadcast_via_store(store, "config", place, lambda: json.dumps(_composed(compose, place))))
        if "faults" in told:
            raise UserInputError(told["faults"])
        worker = Worker(**told, environment=place, store=store)
        with worker.topology() as topology:
            return worker.work(topology)
    except UserInputError as error:
        if place.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return "bad_input"
    except BaseException as error:
        _exit_on_failure(place, worker, error)


def _composed(compose: Callable[[], Tree], environment: ClusterEnvironment) -> dict[str, Any]:
    """The configuration, and the number of clients of the run that it goes on with; or what is wrong."""
    try:
        tree = compose()
        check_ranks(environment, tree["launch"]["nproc_per_node"])
        clients = RunDir(Path(tree["run_dir"])).num_clients()
    except ValueError as error:
        return {"faults": str(error)}
    if tree["clients"] == "auto" and clients:
        tree["clients"] = clients
    return {"tree": tree, "clients": clients}


class Worker:
    """One rank of a run from here to its end, in contact with its launcher and the other ranks."""

    def __init__(self, tree: Tree, clients: int | None, environment: ClusterEnvironment, store: Any):
        self.tree, self.clients, self.environment, self.store = tree, clients, environment, store
        self.config: Config = read_config(tree)
        configure_torch(self.config, environment)
        self.folder = RunDir(Path(str(self.config.run_dir)))
        self.control = LoopControl(self.config.checkpoint.every_seconds, self.config.launch.max_seconds)
        self.heartbeat = Heartbeat(store.clone(), environment.rank, self.control.activity)
        self.is_first = environment.rank == 0
        self.storage: SharedStorage

    @contextmanager
    def topology(self) -> Iterator[Topology]:
        """This rank's place in the world; while it lasts, signals are heeded and the heart beats."""
        launch = self.config.launch
        between = (launch.silo_timeout_seconds, launch.inter_silo_timeout_seconds, launch.inter_silo_backend)
        with ExitStack() as stack:
            stack.enter_context(handle_stop_signals(self.control.request_stop, hard_exit))
            stack.enter_context(self.heartbeat.running(lambda: self.control.stop_requested, self.control.request_stop))
            where = (self.config.silos, self.environment, self.store, launch.device)
            world = distributed(*where, *between, self.clients, launch.backend)
            try:
                topology = stack.enter_context(world)
            except ValueError as error:
                raise UserInputError(str(error)) from error
            yield topology

    def work(self, topology: Topology) -> Status:
        """Trains to the end, or until told to leave; says how it went, also in state.json."""
        must_be_shared = self.config.require_shared_run_dir is True
        self.storage = _on_all_ranks(lambda: detect_shared_storage(self.folder.path, self.environment, must_be_shared))
        _on_all_ranks(
            lambda: (
                self.folder.create_or_check(self.tree, is_restart=restart_count() > 0)
                if self.writes_to_storage
                else None
            )
        )
        self.folder.start_log(topology.rank)
        if collectives.broadcast_text(
            "finished" if self.is_first and self.folder.has_finished(self.config.rounds) else ""
        ):
            if self.is_first:
                ConsoleLogger(self.config.rounds, self.folder.path).finalize(self.folder.result(), FinalArtifacts())
            return "finished"
        try:
            self._train(topology)
            status = "finished"
        except UserInputError:
            self._set_status("bad_input")
            raise
        except Preempted:
            status = "preempted"
        self._set_status(status)
        collectives.barrier()  # a launcher reads it when the ranks of its own node have ended, be they the first
        return status

    @property
    def writes_to_storage(self) -> bool:
        """Whether this rank writes what one rank has to on every disk."""
        return self.environment.rank == self.storage.first_rank

    def _set_status(self, status: Any, **facts: Any) -> None:
        if self.writes_to_storage:
            self.folder.set_status(status, **facts)

    def _train(self, topology: Topology) -> None:
        run = _on_all_ranks(lambda: build(self.config, topology))
        self._set_status("running")
        if self.writes_to_storage:
            self.folder.write_config({**self.tree, "clients": len(run.clients)})
        if self.is_first:
            print_banner(run)
        if self.config.run.smoke:
            self._fit_or_skip(run, until=1)
            run = build(self.config, topology)
        result = self._fit_or_skip(run)
        if self.writes_to_storage:
            self.folder.write_models()
            self.folder.write_result(result)

    def _fit_or_skip(self, run: Run, until: int | None = None) -> dict[str, Any]:
        """The result of the run; on_nonfinite_loss=skip leaves out batches after which the loss was not finite."""
        diverged = None
        while True:
            try:
                return self._fit(run, until, diverged)
            except DivergedError as error:
                if error.window is None or self.config.on_nonfinite_loss == "stop":
                    raise
                diverged = error
            if self.is_first:
                print(f"{diverged}: goes back to the last checkpoint, and skips the batches since", flush=True)
            run = build(self.config, run.topology)

    def _fit(self, run: Run, until: int | None, diverged: DivergedError | None) -> dict[str, Any]:
        """The result of the run, continued from its newest checkpoint if there is one."""
        keep = self.config.checkpoint.keep_last
        checkpoints = Checkpointer(self.folder.checkpoints, run.topology, run.assignment_digest, keep, self.storage)
        start = _on_all_ranks(lambda: checkpoints.latest() or self._external_resume_point(run))
        _on_all_ranks(lambda: validate_resume(run, start, self.storage))
        self._announce_start(start)
        console = ConsoleLogger(run.rounds, self.folder.path, run.topology.num_silos)
        sinks = _on_all_ranks(lambda: self._loggers(console, start) if self.is_first else [])
        with ExitStack() as stack:
            for sink in sinks:
                stack.callback(sink.close)
            watch = console.step if self.is_first else None
            if watch and self.config.run.profile:
                watch = stack.enter_context(profile_steps(watch, self.folder.profile, run.topology.device))
            return fit(run, sinks, checkpoints, start, watch, until, self.control, diverged)

    def _external_resume_point(self, run: Run) -> ResumePoint | None:
        """The checkpoint of another run that resume= names, if it names one."""
        if self.config.resume in ("auto", "never"):
            return None
        elsewhere = RunDir(Path(self.config.resume)).checkpoints
        return Checkpointer(elsewhere, run.topology, run.assignment_digest, storage=self.storage).latest()

    def _announce_start(self, resume_point: ResumePoint | None) -> None:
        """Says where the run goes on; Diverged when the last starts have come no further."""
        place = resume_point.description if resume_point else "the beginning"
        fruitless = ""
        if self.is_first:
            for reason in resume_point.rejected if resume_point else ():
                print(f"passed over: {reason}", file=sys.stderr, flush=True)
            if resume_point:
                print(f"goes on from {place}", flush=True)
            if self.folder.count_start(place, restart_count()) >= MAX_STARTS_WITHOUT_PROGRESS:
                fruitless = (
                    f"{MAX_STARTS_WITHOUT_PROGRESS} starts in a row came no further than {place}: not started again."
                )
        if fruitless := collectives.broadcast_text(fruitless):
            raise DivergedError(fruitless)

    def _loggers(self, console: ConsoleLogger, resume_point: ResumePoint | None) -> list[Logger]:
        """Where rank 0 sends the metrics; what an earlier start wrote after the checkpoint is cut off."""
        rounds = resume_point.logged_rounds if resume_point else 0
        scalars = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in flatten(self.tree).items()
        }
        purge_round = rounds + 1 if resume_point else None
        compared = {key: value for key, value in scalars.items() if not key.startswith(CHANGEABLE_KEYS)}
        board = TensorBoardLogger(self.folder.tensorboard, compared, purge_round)
        others = build_loggers(self.config, self.folder.path, scalars)
        return [JsonLinesLogger(self.folder.metrics, rounds), board, *others, console]


def _on_all_ranks(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, if it raised no ValueError on any; else UserInputError with all that were raised."""
    made, fault = None, ""
    try:
        made = make()
    except ValueError as error:
        fault = str(error)
    errors = [text for text in collectives.all_gather_texts(fault) if text]
    if errors:
        raise UserInputError("\n".join(dict.fromkeys(errors)))
    return made  # pyright: ignore[reportReturnType] (without a fault it was made)


def print_banner(run: Run) -> None:
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


def _exit_on_failure(environment: ClusterEnvironment, worker: Worker | None, error: BaseException) -> NoReturn:
    """Says why this rank failed, and ends the process at once: its peers may be waiting in a collective."""
    if isinstance(error, KeyboardInterrupt):
        os._exit(130)
    log.error("failed", exc_info=error)
    folder = worker.folder if worker else None
    if isinstance(error, DivergedError):  # known to every rank
        if worker and worker.is_first:
            worker.folder.set_status("crashed", error=str(error), final=True)
            print(error, file=sys.stderr, flush=True)
        time.sleep(0 if environment.rank == 0 else ROOT_CAUSE_GRACE_SECONDS)
        os._exit(1)
    said = _describe_failure(environment, worker, error)
    status = "bad_input" if isinstance(error, OutOfMemoryError) else "crashed"
    if folder and folder.path.exists() and folder.claim_failure("run"):
        folder.set_status(status, rank=environment.rank, error=f"{type(error).__name__}: {error}")
    if folder and not folder.claim_failure(f"node-{environment.node}"):
        time.sleep(ROOT_CAUSE_GRACE_SECONDS)
        os._exit(1)
    print(said, file=sys.stderr, flush=True)
    os._exit(1)


def _describe_failure(environment: ClusterEnvironment, worker: Worker | None, error: BaseException) -> str:
    """What is said of a failure. Who lost a peer waits for that one to speak first."""
    if worker and collectives.has_timed_out(error):
        doing = worker.heartbeat.activities(environment.world_size)
        return f"rank {environment.rank} waited in vain while {worker.control.activity()}:\n{doing}"
    if collectives.has_lost_peers(error):
        time.sleep(ROOT_CAUSE_GRACE_SECONDS)
        return f"rank {environment.rank} lost its peers: {str(error).splitlines()[0]}"
    if isinstance(error, OutOfMemoryError):
        return f"rank {environment.rank}: {error}"
    if isinstance(error, DiskFullError):
        return f"rank {environment.rank}: {error.strerror}"
    return f"rank {environment.rank} failed:\n{''.join(traceback.format_exception(error))}"
