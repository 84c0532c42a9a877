"""The life of one worker: it learns its place and the configuration, builds the run, trains, and leaves in order.

A worker that was misconfigured says so, writes `bad_input` to state.json and ends well: torchrun would restart one that
failed, and report every rank. `python -m trainer` turns state.json into the exit code.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer import comm
from trainer.build import build
from trainer.checkpoint import Checkpoints, Saved
from trainer.config import Config, read_config
from trainer.data import describe
from trainer.fit import fit
from trainer.folder import RunFolder, flatten
from trainer.launch.torchrun import choose_threads
from trainer.metrics import Console, Exhibits, JsonLines, Metrics, Sink, TensorBoard
from trainer.run import Run
from trainer.topology import Place, Topology, distributed, meet, place_of_torchrun, share

T = TypeVar("T")
Tree = dict[str, Any]

log = logging.getLogger("trainer")
log.addHandler(logging.NullHandler())  # until the run folder is known, failures are printed only

SECONDS_FOR_THE_CULPRIT = 3  # a rank that lost its peers lets the one that failed speak, and end the world, first


class BadInput(Exception):
    """What the user has to change, known before anything was trained, and known to every rank."""


def main(compose: Callable[[], Tree]) -> None:
    """Works until the run is finished or its input is found bad. A failure ends this process with code 1.

    Rank 0 composes the configuration; the others get it, resolved.
    """
    place = place_of_torchrun()
    folder = None
    try:
        store = meet(place)
        tree = json.loads(share(store, "config", place, lambda: json.dumps(_composed(compose))))
        if "faults" in tree:
            raise BadInput(tree["faults"])
        config = read_config(tree)
        torch.set_num_threads(choose_threads(config.launch.threads, place.local_world_size))
        folder = RunFolder(Path(str(config.run_dir)))
        with _topology(config, place, store) as topology:
            _work(config, tree, folder, topology)
    except BadInput as error:
        if place.rank == 0:
            print(error, file=sys.stderr, flush=True)
    except BaseException as error:
        _fail(place.rank, folder, error)


def _composed(compose: Callable[[], Tree]) -> Tree:
    try:
        return compose()
    except ValueError as error:
        return {"faults": str(error)}


@contextmanager
def _topology(config: Config, place: Place, store: Any) -> Iterator[Topology]:
    timeouts = (config.launch.silo_timeout_seconds, config.launch.between_timeout_seconds)
    context = distributed(config.silos, place, store, config.launch.device, *timeouts)
    try:
        topology = context.__enter__()
    except ValueError as error:
        raise BadInput(str(error)) from error
    try:
        yield topology
    finally:
        context.__exit__(None, None, None)


def _work(config: Config, tree: Tree, folder: RunFolder, topology: Topology) -> None:
    first = topology.rank == 0
    _together(lambda: folder.open(tree) if first else None)
    folder.start_log(topology.rank)
    if comm.broadcast_text("finished" if first and folder.has_finished(config.rounds) else ""):
        if first:
            Console(config.rounds, folder.path).finish(folder.result(), Exhibits())
        return
    try:
        _train(config, tree, folder, topology)
    except BadInput:
        if first:
            folder.set_status("bad_input")
        raise


def _train(config: Config, tree: Tree, folder: RunFolder, topology: Topology) -> None:
    first = topology.rank == 0
    run = _together(lambda: build(config, topology))
    if first:
        folder.set_status("running")
        introduce(run)
    if config.run.smoke:
        _fit(config, tree, folder, run, until=1)
        run = build(config, topology)
    result = _fit(config, tree, folder, run)
    if first:
        folder.write_result(result)
        folder.set_status("finished")


def _together(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, if it raised no ValueError on any; else BadInput with all that were raised."""
    made, fault = None, ""
    try:
        made = make()
    except ValueError as error:
        fault = str(error)
    faults = [text for text in comm.gather_texts(fault) if text]
    if faults:
        raise BadInput("\n".join(dict.fromkeys(faults)))
    return made  # pyright: ignore[reportReturnType] (without a fault it was made)


def _fit(config: Config, tree: Tree, folder: RunFolder, run: Run, until: int | None = None) -> Metrics:
    """The result of the run, continued from its newest checkpoint if there is one."""
    first = run.topology.rank == 0
    checkpoints = Checkpoints(folder.checkpoints, first, config.checkpoint.keep)
    start = _together(checkpoints.newest)
    console = Console(run.rounds, folder.path, run.topology.num_silos)
    sinks = _sinks(tree, folder, console, start) if first else []
    try:
        return fit(run, sinks, checkpoints, start, console.step if first else None, until)
    finally:
        for sink in sinks:
            sink.close()


def _sinks(tree: Tree, folder: RunFolder, console: Console, start: Saved | None) -> list[Sink]:
    """Where rank 0 sends the metrics; what an earlier start wrote after the checkpoint is cut off."""
    rounds = start.rounds if start else 0
    scalars = {
        key: value if isinstance(value, str | int | float) else str(value) for key, value in flatten(tree).items()
    }
    board = TensorBoard(folder.tensorboard, scalars, purge_round=rounds + 1 if start else None)
    return [JsonLines(folder.metrics, rounds), board, console]


def introduce(run: Run) -> None:
    """Prints who trains what on what."""
    topology, clients = run.topology, run.clients
    parameters = sum(parameter.numel() for parameter in run.module.parameters())
    examples = [sum(map(len, ids)) for ids in (clients.train, clients.validation, clients.test)]
    sizes = ",".join(map(str, topology.silo_sizes))
    print(
        f"workers   {topology.world_size} on {topology.device.type}, threads each: {torch.get_num_threads()}; "
        f"replicas in the silos: [{sizes}]\n"
        f"model     {type(run.module).__name__}, {parameters:,} parameters\n"
        f"examples  {examples[0]:,} to train, {examples[1]:,} to validate, {examples[2]:,} to test\n"
        f"clients   {len(clients)}",
        flush=True,
    )
    if run.per_client == "full" and len(clients) > 1:
        print(describe(clients, run.data.train, run.data.label_names), flush=True)


def _fail(rank: int, folder: RunFolder | None, error: BaseException) -> None:
    """Says why this rank failed, and ends the process at once: its peers may be waiting in a collective."""
    if isinstance(error, KeyboardInterrupt):
        os._exit(130)
    log.error("failed", exc_info=error)
    if comm.has_lost_peers(error):
        time.sleep(SECONDS_FOR_THE_CULPRIT)
        said = f"rank {rank} lost its peers: {str(error).splitlines()[0]}"
    else:
        said = f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}"
    if folder and not folder.claim_failure():
        time.sleep(SECONDS_FOR_THE_CULPRIT)
        os._exit(1)
    if folder and folder.path.exists():
        folder.set_status("crashed", rank=rank, error=f"{type(error).__name__}: {error}")
    print(said, file=sys.stderr, flush=True)
    os._exit(1)
