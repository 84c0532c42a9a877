"""One worker: gets its rank and the configuration, builds the run, trains, and shuts down.

A worker with a bad configuration prints the errors, writes `bad_input` to state.json and exits with code 0: torchrun
would restart one that failed, and report every rank. A preempted one writes `preempted`, and exits with code 0 too.
`python -m trainer` turns state.json into its exit code; under srun the workers return it themselves.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainer import __version__
from trainer.checkpoint import ResumePoint, SharedStorage, detect_shared_storage
from trainer.checkpoint.files import private_files
from trainer.checkpoint.run_dir import CHANGEABLE_KEYS, RunDir, Status
from trainer.commands.options import LOG_LEVEL, QUIET
from trainer.commands.train.banner import print_banner
from trainer.commands.train.failures import exit_on_failure, log_thread_failure
from trainer.commands.train.torch_settings import configure_torch, resume_threads
from trainer.config.build import build, build_loggers, read_data
from trainer.config.saved_model import find_weights, load_weights
from trainer.config.schema import Config, read_config
from trainer.config.targets import check_targets
from trainer.data.sources.signature import DataSignature
from trainer.distributed import collectives
from trainer.distributed.environment import ClusterEnvironment, check_ranks, detect_environment
from trainer.distributed.launch.heartbeat import Heartbeat
from trainer.distributed.launch.signals import handle_stop_signals, hard_exit
from trainer.distributed.peers import Peers
from trainer.distributed.sharding import whole_tensor
from trainer.distributed.store import SignedStore, open_store, print_on_node
from trainer.distributed.token import find_token, token_file
from trainer.distributed.topology import Topology, distributed, restart_count
from trainer.export.library_layout import write_library_layout
from trainer.loggers import ConsoleLogger, FinalArtifacts, JsonLinesLogger, Logger, SystemLogger, TensorBoardLogger
from trainer.loop.checkpointing import logged_metrics, logged_steps, make_checkpointer, saved_threads, validate_resume
from trainer.loop.control import Action, LoopControl
from trainer.loop.exchange import ExchangeFactory, InWorld
from trainer.loop.fit import Result, fit
from trainer.loop.profiler import profile_steps
from trainer.loop.run import Run
from trainer.loop.stopping import DivergedError, LeftBehind, Preempted
from trainer.loop.train_state import TrainState
from trainer.models.adapters import adapter_parameters, is_adapted
from trainer.models.flat import frozen_tensors
from trainer.models.pruning import dense_tensors, is_pruned, unpruned
from trainer.utils.disk import DiskError, naming_disk
from trainer.utils.hardware import system_load
from trainer.utils.output import copied_output
from trainer.utils.text import first_few
from trainer.utils.trees import flatten

log = logging.getLogger(__name__)

T = TypeVar("T")
Tree = dict[str, Any]

MAX_LOST_NAMED = 5
FAREWELL_SECONDS = 5.0  # that a site with the result of its run looks for the coordinator
MAX_STARTS_WITHOUT_PROGRESS = 3  # in a row; there is no further one


class UserInputError(Exception):
    """An error for the user to correct, found before training, and raised on every rank."""


def main(compose: Callable[[], Tree], own: Sequence[str]) -> Status:
    """Work until the run is finished or preempted, or its input is found bad. A failure ends the process with code 1.

    Args:
        compose: makes the resolved configuration. Rank 0 calls it, and the others receive its result.
        own: overrides of this rank, and the configuration that its launcher has given it, see `check_targets`.
    """
    environment, worker = detect_environment(), None
    threading.excepthook = log_thread_failure
    try:
        token = find_token(token_file(own))
    except ValueError as error:  # without it the other ranks cannot be reached
        print_on_node(environment, str(error))
        return "bad_input"
    try:
        peers = Peers(environment, open_store(environment, token))
        try:
            composed = peers.broadcast("config", lambda: _composed(compose, environment))
            peers.on_all_ranks("targets", lambda: check_targets(composed, own))
        except ValueError as error:
            raise UserInputError(str(error)) from error
        worker = Worker(**composed, environment=environment, store=peers.store)
        # A member of a federation holds what other organisations have sent it.
        private = private_files() if worker.config.site.is_federated else nullcontext()
        with private, worker.topology() as topology:
            return worker.work(topology)
    except UserInputError as error:
        if environment.rank == 0:
            print(error, file=sys.stderr, flush=True)
        return "bad_input"
    except BaseException as error:
        known = (worker.folder, worker.heartbeat, worker.control) if worker else (None, None, None)
        exit_on_failure(error, environment, *known)
    finally:
        if worker:
            worker.output.close()
            worker.folder.lock.release()


def _composed(compose: Callable[[], Tree], environment: ClusterEnvironment) -> dict[str, Any]:
    """Return the configuration, and the number of clients of the run it continues; raise ValueError for its errors."""
    tree = compose()
    check_ranks(environment, tree["launch"]["nproc_per_node"])
    clients = RunDir(Path(tree["run_dir"])).num_clients()
    if tree["clients"] == "auto" and clients:
        tree["clients"] = clients
    return {"tree": tree, "clients": clients}


class Worker:
    """One rank of a run, from the configuration to the end.

    Attributes:
        clients: the number of clients of the run that this one continues; None for a new one.
        control: what the launcher and the other ranks ask of this one.
        prints: whether this rank prints the progress of the run.
        has_banner: whether it has printed what begins.
        output: what this rank prints, of which the run folder has a copy once it is known.
        storage: which ranks share the run folder.
    """

    def __init__(self, tree: Tree, clients: int | None, environment: ClusterEnvironment, store: SignedStore):
        self.tree, self.clients, self.environment, self.store = tree, clients, environment, store
        self.config: Config = read_config(tree)
        configure_torch(self.config, environment)
        self.folder = RunDir(Path(str(self.config.run_dir)))
        self.control = LoopControl(self.config.checkpoint.every_seconds, self.config.launch.max_seconds)
        self.heartbeat = Heartbeat(store.clone(), environment.rank, self.control.activity)
        self.is_first = environment.rank == 0
        self.prints = self.is_first and QUIET not in os.environ
        self.has_banner = False
        self.output = ExitStack()
        self.storage: SharedStorage

    @contextmanager
    def topology(self) -> Iterator[Topology]:
        """Open this rank's process groups. Until the block is left, it handles signals and sends heartbeats."""
        launch = self.config.launch
        between = (launch.silo_timeout_seconds, launch.inter_silo_timeout_seconds, launch.inter_silo_backend)
        with ExitStack() as stack:
            stack.enter_context(handle_stop_signals(self.control.request_stop, hard_exit))
            stack.enter_context(self.heartbeat.running(lambda: self.control.stop_requested, self.control.request_stop))
            position = (self.config.silos, self.environment, self.store, launch.device)
            silo = self.config.silo
            world = distributed(*position, *between, self.clients, launch.backend, silo.shard, silo.tensor)
            try:
                topology = stack.enter_context(world)
            except ValueError as error:
                raise UserInputError(str(error)) from error
            yield topology

    def work(self, topology: Topology) -> Status:
        """Train to the end, or until preempted; return the status, and write it to state.json."""
        must_be_shared = self.config.require_shared_run_dir is True
        self.storage = _on_all_ranks(lambda: detect_shared_storage(self.folder.path, self.environment, must_be_shared))
        _on_all_ranks(self._create_or_check_folder)
        self.folder.start_log(topology.rank)
        self._check_starts()
        logging.getLogger().setLevel(os.environ.get(LOG_LEVEL, "INFO"))
        self._log_start(topology)
        if collectives.broadcast_text(
            "finished" if self.is_first and self.folder.has_finished(self.config.rounds) else ""
        ):
            if self.prints:
                ConsoleLogger(self.config.rounds, self.folder.path).finalize(self.folder.result(), FinalArtifacts())
            return "finished"
        self.output.enter_context(copied_output(self.folder.console))
        try:
            if self.writes_to_storage:
                self.folder.set_running()
            self._train(topology)
            status = "finished"
        except UserInputError:
            self._set_status("bad_input")
            raise
        except Preempted:
            status = "preempted"
        self._set_status(status)
        log.info("ended: %s", status)
        collectives.barrier()  # a launcher reads it when the ranks of its node have ended, even if they are the first
        return status

    def _log_start(self, topology: Topology) -> None:
        log.info(
            "started: rank %d of %d, replica %d of silo %d (replicas: %s), on %s of %s, threads: %d, restarts: %d, "
            "process %d, silotrain %s, torch %s",
            *(topology.rank, topology.world_size, topology.replica, topology.silo, list(topology.silo_sizes)),
            *(topology.device, socket.gethostname(), torch.get_num_threads(), restart_count()),
            *(os.getpid(), __version__, torch.__version__),
        )

    @property
    def writes_to_storage(self) -> bool:
        """Whether this rank writes the files that one rank of each disk writes."""
        return self.environment.rank == self.storage.first_rank

    def _create_or_check_folder(self) -> None:
        if self.writes_to_storage:
            self.folder.create_or_check(self.tree, is_restart=restart_count() > 0)

    def _check_starts(self) -> None:
        """Count this start; raise DivergedError on all ranks if the ones before have all come no further."""
        failed = _on_all_ranks(lambda: self.folder.count_start(restart_count()) - 1 if self.is_first else 0)
        fruitless = f"{failed} starts in a row came no further than {self.folder.newest_checkpoint()}: not restarted."
        if fruitless := collectives.broadcast_text(fruitless if failed >= MAX_STARTS_WITHOUT_PROGRESS else ""):
            raise DivergedError(fruitless)

    def _set_status(self, status: Status) -> None:
        if self.writes_to_storage:
            self.folder.set_status(status)

    def _train(self, topology: Topology) -> None:
        if not self.config.site.is_federated:
            self._train_run(_on_all_ranks(lambda: build(self.config, topology)), InWorld)
            return
        from trainer.federation.membership import open_membership  # with cryptography, which other runs do without

        site, has_result = self.config.site, self._has_result()
        if has_result:  # it was killed while it took its leave: the coordinator may have ended since
            site = replace(site, retry_seconds=min(site.retry_seconds, FAREWELL_SECONDS))
        with ExitStack() as stack:
            opened = open_membership(site, self.tree, topology, self._is_stopping)
            member = _on_all_ranks(lambda: stack.enter_context(opened))
            if self.prints:
                print(member.notice, flush=True)
            try:
                splits = member.join(lambda: read_data(self.config, topology))
            except ValueError as error:
                raise UserInputError(str(error)) from error
            except Preempted:
                if has_result:
                    return
                raise
            place = member.topology(topology)
            self._train_run(_on_all_ranks(lambda: build(self.config, place, splits)), member.make_exchange)
            member.finish()
            self._set_status("finished")  # before this launch removes what others might have needed

    def _has_result(self) -> bool:
        has_result = self.is_first and self.folder.has_result(self.config.rounds)
        return bool(collectives.broadcast_text("yes" if has_result else ""))

    def _is_stopping(self) -> bool:
        return self.control.requested_action() is Action.STOP

    def _train_run(self, run: Run, make_exchange: ExchangeFactory) -> None:
        self.make_exchange = make_exchange
        if self.writes_to_storage:
            self.folder.write_config({**self.tree, "clients": len(run.clients)})
            if run.data.encoder:
                self.folder.write_columns(run.data.encoder.to_json())
            if signature := DataSignature.of(run.data, run.clients):
                self.folder.write_signature(signature.to_json())
        if self.config.run.smoke:
            self._fit_or_skip(run, until=1)
        self._fit_or_skip(run)

    def _fit_or_skip(self, run: Run, until: int | None = None) -> None:
        """Train the run to its end.

        on_nonfinite_loss=skip skips the batches that made the loss non-finite. A site that has missed a round continues
        with the others.
        """
        diverged = None
        while True:
            try:
                return self._fit(run, until, diverged)
            except DivergedError as error:
                if error.window is None or self.config.on_nonfinite_loss == "stop":
                    raise
                diverged = error
                reason = f"{diverged}: returns to the last checkpoint, and skips the batches since"
            except LeftBehind:
                reason = "the others went on without this site: it continues with them"
            if self.prints:
                print(reason, flush=True)

    def _fit(self, run: Run, until: int | None, diverged: DivergedError | None) -> None:
        """Train the run to its end, from its newest checkpoint if there is one."""
        before_save = self.folder.sync_metrics if self.is_first else None
        checkpoints = make_checkpointer(run, self.folder.checkpoints, self.storage, before_save)
        start = _on_all_ranks(lambda: checkpoints.latest() or self._external_resume_point(run))
        _on_all_ranks(lambda: validate_resume(run, start, self.storage))
        self._announce_start(start)
        self._resume_threads(start)
        console = ConsoleLogger(run.rounds, self.folder.path, run.topology.num_silos)
        loggers = _on_all_ranks(lambda: self._loggers(console, start, run.topology.device) if self.is_first else [])
        with ExitStack() as stack:
            for logger in loggers:
                stack.callback(logger.close)
            on_step = console.step if self.prints else None
            if self.is_first and self.config.run.profile:
                profiling = profile_steps(on_step or _ignore_step, self.folder.profile, run.topology.device)
                on_step = stack.enter_context(profiling)
            write_result = partial(self._write_result, run)
            fit(
                run,
                loggers,
                checkpoints,
                start,
                on_step,
                self._on_start,
                until,
                self.control,
                diverged,
                write_result,
                self.make_exchange,
            )

    def _on_start(self, state: TrainState) -> None:
        """Save what transforms have measured, and print the banner, before the first step."""
        statistics = state.trainer.transforms.state_dict()
        if self.writes_to_storage and statistics:
            self.folder.write_transforms(statistics)
        if self.prints and not self.has_banner:
            self.has_banner = True
            print_banner(state)

    def _write_result(self, run: Run, result: Result) -> None:
        frozen = _kept_frozen(result.model)
        if not self.writes_to_storage:
            return
        finish = partial(dense_tensors, result.model) if is_pruned(result.model) else None
        self.folder.write_models(frozen, finish)
        if not run.has_personal(result.model):
            self._export(run, result.model)
        self.folder.write_result(result.metrics)

    def _export(self, run: Run, trained: nn.Module) -> None:
        """Write the finished model as other tools read it. Where a library fails, the run is finished all the same."""
        tokenizer, merge = self.config.data.get("tokenizer"), self.config.adapter.get("merge", False)
        try:
            with naming_disk(self.folder.path, "the model is in model.safetensors"):
                module = unpruned(trained) if run.topology.num_parts == 1 else self._whole_model(run)
                write_library_layout(module, self.folder.path, merge, tokenizer and Path(tokenizer).expanduser())
        except DiskError:
            raise
        except Exception as error:
            log.exception("the model is in model.safetensors alone")
            print(f"the model is in model.safetensors alone: {error}", file=sys.stderr, flush=True)

    def _whole_model(self, run: Run) -> nn.Module:
        """Return the finished model on the CPU, whole, where this rank has trained a part of it."""
        module = run.make_model()
        load_weights(module, find_weights(self.folder, "last"))
        return module

    def _external_resume_point(self, run: Run) -> ResumePoint | None:
        """Return the newest checkpoint of the run that resume= names, if it names one."""
        if self.config.resume in ("auto", "never"):
            return None
        elsewhere = RunDir(Path(self.config.resume)).checkpoints
        found = make_checkpointer(run, elsewhere, self.storage).latest()
        return found and replace(found, is_of_other_run=True)

    def _announce_start(self, resume_point: ResumePoint | None) -> None:
        """Print where the run continues."""
        if not (self.is_first and resume_point):
            return
        for reason in resume_point.rejected:
            print(f"skipped: {reason}", file=sys.stderr, flush=True)
        if self.prints:
            print(f"continues from {resume_point.description}", flush=True)

    def _resume_threads(self, resume_point: ResumePoint | None) -> None:
        """Take the number of threads with which the run has trained, if it has as many workers."""
        threads = saved_threads(resume_point) if resume_point else []
        if len(threads) != self.environment.world_size:
            return
        differs = resume_threads(self.config, threads[self.environment.rank])
        if differs and self.prints:
            print(differs, flush=True)

    def _loggers(self, console: ConsoleLogger, resume_point: ResumePoint | None, device: torch.device) -> list[Logger]:
        """Make rank 0's loggers. Those that write files cut off the rounds after the checkpoint."""
        rounds, steps = (resume_point.logged_rounds, logged_steps(resume_point)) if resume_point else (0, 0)
        history = JsonLinesLogger(self.folder.metrics, rounds, steps)
        if resume_point and self.config.resume in ("auto", "never"):  # another run's rounds are in its own folder
            lost = history.restore(logged_metrics(resume_point))
            for text in first_few(lost, MAX_LOST_NAMED):
                print(f"{self.folder.metrics} has lost round {text}", file=sys.stderr, flush=True)
        scalars = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in flatten(self.tree).items()
        }
        compared = {key: value for key, value in scalars.items() if not key.startswith(CHANGEABLE_KEYS)}
        purge = (rounds + 1, int(steps) + 1 if math.isfinite(steps) else None) if resume_point else (None, None)
        charts = TensorBoardLogger(self.folder.tensorboard, compared, *purge)
        recorders: list[Logger] = [history, charts, *build_loggers(self.config, self.folder.path, scalars)]
        return [SystemLogger(recorders, partial(system_load, device)), *([console] if self.prints else [])]


def _kept_frozen(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen parameters that a finished model is written with: all but those of the base of an adapter.

    A collective of the silo where its ranks hold parts of them.
    """
    frozen = frozen_tensors(module)
    names = adapter_parameters(module) if is_adapted(module) else frozen
    return {name: whole_tensor(tensor).cpu() for name, tensor in frozen.items() if name in names}


def _ignore_step(done: float, examples: int, loss: Callable[[], float]) -> None:
    """Do nothing after a step: the callback of a run that prints nothing."""


def _on_all_ranks(make: Callable[[], T]) -> T:
    """Return the result of `make` on this rank.

    Raises:
        UserInputError: `make` raised ValueError on some ranks; lists the errors of all.
    """
    try:
        return collectives.on_all_ranks(make)
    except ValueError as error:
        raise UserInputError(str(error)) from error
