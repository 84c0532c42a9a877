"""Saving and restoring: one list of named sections for checkpoints after a round and in the middle of one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.algorithms.client_result import client_result_from_state, merge_client_results
from trainer.checkpoint import Checkpointer, ResumePoint, SharedStorage
from trainer.checkpoint.format import SavedState
from trainer.checkpoint.model_cut import CUT
from trainer.checkpoint.resume import step_number
from trainer.distributed.silos import count_shards
from trainer.distributed.topology import Topology
from trainer.loggers import Metrics
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.progress import Progress
from trainer.loop.resharding import SavedParts, model_cut
from trainer.loop.round_metrics import RoundAccumulator
from trainer.loop.round_snapshot import RoundSnapshot
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.buffers import load_buffers
from trainer.tasks.base import fingerprint
from trainer.utils.errors import InputError

# Which ranks hold a section alike: all ranks; those that move the same shard of the shared vector; the replicas of a
# silo; or each rank its own, `unique` under names that no other rank uses, or as a `rank` that is read by itself.
Scope = Literal["all", "shard", "silo", "unique", "rank"]

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A named part of a checkpoint.

    Attributes:
        name: of the section; two of different scopes may share one, and are loaded as one tree.
        scope: which ranks hold it alike.
        state: returns a tree of live tensors and numbers.
        load: restores the tree; of scope `rank` it gets those of this rank, or of all ranks if their number has
            changed. None: it is loaded with another section of this name, or by hand.
        wanted: says of the name of a leaf whether this rank needs it.
    """

    name: str
    scope: Scope
    state: Callable[[], Any]
    load: Callable[[Any], None] | None = None
    wanted: Callable[[str], bool] = bool


def make_checkpointer(
    run: Run, folder: Path, storage: SharedStorage | None = None, before_save: Callable[[], None] | None = None
) -> Checkpointer:
    """Make what writes the checkpoints of a run into a folder, and finds the newest there. All ranks must call it.

    Args:
        run: the choices.
        folder: of the checkpoints alone.
        storage: which ranks share the folder; None: all of them.
        before_save: is called by the writing thread before each save.
    """
    return Checkpointer(
        folder, run.topology.of_launch, run.assignment_digest, run.checkpoint.keep_last, storage, before_save
    )


def save_round_checkpoint(state: TrainState, checkpointer: Checkpointer, is_best: bool = False) -> None:
    """Start writing the checkpoint between two rounds."""
    rounds, suffix = state.progress.rounds, ""
    if state.progress.unevaluated_metrics is not None:
        rounds, suffix = rounds + 1, "-unevaluated"
    sections = [*_common_sections(state), *_round_sections(state)]
    local, any_has_moved = state.trainer.local_tensors.state_dict_anywhere()
    checkpointer.save_round(
        f"round-{rounds:06d}{suffix}",
        replicated=_trees(sections, "all"),
        sharded=_trees(sections, "shard"),
        per_silo=_trees(sections, "silo"),
        unique=_trees(sections, "unique"),
        per_rank={"own": {**_trees(sections, "rank"), "local": local}},
        all_ranks_write=state.run.algorithm.keeps_client_state or state.transport.stateful or any_has_moved,
        is_best=is_best,
    )


def save_round_snapshot(state: TrainState, checkpointer: Checkpointer, snapshot: RoundSnapshot) -> None:
    """Start writing this silo's part of a round: all that it needs to continue from this step. No collective."""
    client = snapshot.client
    # Where no client is left out, the state that the client in training keeps is the optimizer's, saved there.
    without = client.result.client if client and not state.run.algorithm.skips_nonfinite_clients else None
    sections = [*_common_sections(state, without), *_snapshot_sections(state, snapshot)]
    checkpointer.save_mid_round(
        state.progress.rounds,
        snapshot.steps,
        replicated=_trees(sections, "all", "silo"),
        sharded=_trees(sections, "shard", "unique"),
        per_rank=_trees(sections, "rank"),
    )


def resume(state: TrainState, resume_point: ResumePoint | None) -> RoundSnapshot | None:
    """Restore a checkpoint, if there is one, or the state of the others if they went on without this silo.

    Returns:
        The middle of the round from which this silo continues; None between two rounds.
    """
    newest = state.exchange.catch_up(resume_point.logged_rounds if resume_point else 0, partial(_late_state, state))
    if newest is None:
        return restore(state, resume_point) if resume_point else None
    if resume_point and resume_point.round_checkpoint:  # clients' states: what they have done since did not count
        restore(state, replace(resume_point, mid_round={}))
    best = state.progress.best_saved_score, state.progress.best_saved_round
    for section in _late_sections(state):
        if section.load:
            section.load(newest.get(section.name, {}))
    state.progress.best_saved_score, state.progress.best_saved_round = best
    return None


def _late_sections(state: TrainState) -> list[Section]:
    """Return what a silo needs to continue with the others that it has not done itself."""
    algorithm = state.algorithm
    shared = [section for section in _common_sections(state) if section.name in ("progress", "ema")]
    vectors = Section("vectors", "all", algorithm.global_state, lambda tree: algorithm.load_global_state(dict(tree)))
    return [*shared, *_round_sections(state), vectors]


def _late_state(state: TrainState) -> Tree:
    return {section.name: section.state() for section in _late_sections(state)}


def restore(state: TrainState, resume_point: ResumePoint) -> RoundSnapshot | None:
    """Restore a checkpoint between two rounds, or the middle of one, which is returned. A collective of the silo."""
    snapshot = _restore(state, resume_point)
    if resume_point.is_of_other_run:
        state.progress.best_saved_score = state.progress.best_saved_round = None
    return snapshot


def _restore(state: TrainState, resume_point: ResumePoint) -> RoundSnapshot | None:
    topology = state.run.topology.of_launch
    _check_frozen(state, resume_point)
    mid_round = resume_point.mid_round.get(topology.silo)
    if mid_round is None:
        assert resume_point.round_checkpoint is not None
        local = _restore_round(state, _saved_parts(state, resume_point.round_checkpoint))
        if _has_trained(state):
            state.trainer.warm_up_ddp()
        state.trainer.local_tensors.load_state_dict(local)
        return None
    rank_states = [mid_round.load_shard(shard, "own") for shard in _shards_of_rank(mid_round, topology)]
    snapshot = _restore_snapshot(state, _saved_parts(state, mid_round), rank_states)
    if _has_trained(state) or snapshot.steps:
        state.trainer.warm_up_ddp()
    _restore_after_warm_up(state, rank_states)
    return snapshot


def _saved_parts(state: TrainState, saved: SavedState) -> SavedParts:
    return SavedParts(saved, state.model, state.run.topology.part, state.trainer.step.optimizer_state)


def _check_frozen(state: TrainState, resume_point: ResumePoint) -> None:
    """Raise InputError, on every rank alike, if the frozen parameters are not those that this run was begun with."""
    if resume_point.states[0].load("progress")["frozen"] != state.trainer.local_tensors.frozen_digest:
        raise InputError(
            "model= has other frozen parameters than this run was begun with. Checkpoints do not contain them:\n"
            "they are made again from seed=, model.path= and model.init=.\n"
            "  restore the files of model.path= or model.init=, or choose another run_dir"
        )


def logged_metrics(resume_point: ResumePoint) -> Metrics:
    """Return the metrics of the last round that was logged before a checkpoint; empty if there was none."""
    return json.loads(resume_point.states[0].load("progress")["json"])["metrics"]


def logged_steps(resume_point: ResumePoint) -> float:
    """Return the last step whose metrics the loggers have, and that a checkpoint counts."""
    if resume_point.rounds > resume_point.logged_rounds:
        return math.inf  # all of a round that has only to be evaluated
    before, saved = logged_metrics(resume_point).get("steps", 0), resume_point.mid_round.get(0)
    return before + (step_number(saved.folder) if saved else 0)  # rank 0 logs, which is of silo 0


def validate_resume(run: Run, resume_point: ResumePoint | None, storage: SharedStorage) -> None:
    """Raise ValueError when a run would resume with other data than before, or without its clients' states."""
    if resume_point is None:
        return
    saved = resume_point.states[0].load("progress")
    silos, dims = (json.loads(saved["json"])[name] for name in ("silo_sizes", "silo_dims"))
    has_states = run.algorithm.keeps_client_state or not run.update_compression.is_identity
    topology = run.topology.of_launch
    is_divided = has_states or max(count_shards(silos), topology.num_shards, topology.num_parts, *dims) > 1
    if is_divided and not storage.is_shared and (silos, dims) != (list(topology.silo_sizes), _dims(topology)):
        raise ValueError(
            f"algorithm={type(run.algorithm).__name__} with update_compression={run.update_compression.name} has left "
            "states on the disks of the nodes that trained:\n"
            f"ranks in the silos were {silos}, and are {list(topology.silo_sizes)}; silo.shard and silo.tensor were "
            f"{dims}, and are {_dims(topology)}.\n"
            "  start it on the same nodes, or put run_dir on a disk that all of them share"
        )
    if saved["data"] != run.data_fingerprint:
        raise ValueError(
            "data= or partition= is not what this run was begun with: the examples or their clients have changed.\n"
            "  restore the data, or choose another run_dir"
        )
    if saved.get("task", "") != fingerprint(run.task):
        raise ValueError(
            "task= is not what this run was begun with: the teacher has changed.\n"
            "  restore the folder of task.teacher, or choose another run_dir"
        )


def saved_threads(resume_point: ResumePoint) -> list[int]:
    """Return the number of CPU threads that each rank had when this was saved."""
    return json.loads(resume_point.states[0].load("progress")["json"])["threads"]


def _common_sections(state: TrainState, without: int | None = None) -> list[Section]:
    """Return the sections of every checkpoint, in the order in which they are restored.

    Args:
        state: the state.
        without: a client whose state is left out.
    """
    clients, topology, run = state.trainer.clients, state.run.topology.of_launch, state.run
    homes = set(run.training_homes[run.topology.silo])

    def load_progress(tree: Tree) -> None:
        state.progress = Progress(**json.loads(tree["json"]))
        state.participations.copy_(tree["participations"])
        metrics = state.progress.unevaluated_metrics or state.progress.metrics
        state.transport.bytes_sent = int(metrics.get("bytes_between_silos", 0))

    def progress() -> Tree:
        state.progress.silo_sizes, state.progress.silo_dims = list(topology.silo_sizes), _dims(topology)
        state.progress.threads = state.threads
        text = json.dumps(asdict(state.progress))
        return {
            "json": text,
            "participations": state.participations,
            "data": run.data_fingerprint,
            "task": fingerprint(run.task),
            "frozen": state.trainer.local_tensors.frozen_digest,
        }

    def load_transport(tree: Tree) -> None:
        # The states of silos that no longer exist go to the others.
        state.transport.load_state_dicts(tree.values(), state.algorithm.parts, _is_same_world(state))

    def initial_states() -> Tree:
        return {"now": clients.initial_personal_state, "next": clients.next_initial_personal_state}

    def load_initial_states(tree: Tree) -> None:
        clients.initial_personal_state = dict(tree.get("now", {}))
        clients.next_initial_personal_state = dict(tree.get("next", {}))

    def is_home(leaf: str) -> bool:
        return int(leaf.split("/")[0]) in homes

    def is_own_silo(leaf: str) -> bool:
        return int(leaf.split("/")[0]) % topology.num_silos == topology.silo

    ema = [Section("ema", "all", state.ema.state_dict, state.ema.load_state_dict)] if state.ema else []
    reducer = state.trainer.step.gradient_reducer
    return [
        Section("progress", "all", progress, load_progress),
        Section(CUT, "all", lambda: {"json": model_cut(state.model).to_json(), "parts": topology.num_parts}),
        *ema,
        Section("fresh", "all", initial_states, load_initial_states),
        Section("clients", "silo", lambda: clients.state_dict(without), clients.load_state_dict, is_home),
        Section(
            "clients",
            "rank",
            lambda: clients.rank_state_dict(without),
            lambda trees: clients.load_rank_state_dicts(trees, reducer),
            is_home,
        ),
        Section(
            "residuals",
            "unique",
            lambda: {str(topology.silo): state.transport.state_dict()},
            load_transport,
            is_own_silo,
        ),
        Section("algorithm", "all", state.algorithm.state_dict),
        Section("algorithm", "shard", state.algorithm.sharded_state_dict),
    ]


def _round_sections(state: TrainState) -> list[Section]:
    """Return what only a checkpoint between two rounds has: the global model is the model."""

    def load_model(tree: Tree) -> None:
        state.model.load_shared_state(dict(tree))
        state.trainer.statistics.take_from_model()

    return [Section("model", "all", state.model.shared_state, load_model)]


def _snapshot_sections(state: TrainState, snapshot: RoundSnapshot) -> list[Section]:
    """Return what only a checkpoint in the middle of a round has: local parameters, sums, the client in training."""
    trainer, client, model = state.trainer, snapshot.client, state.model
    statistics = {"vector": trainer.statistics.vector, "counts": trainer.statistics.counts}
    of_client = client.session.state_dict() if client else {}
    return [
        Section("model", "all", lambda: dict(model.named_trainable)),
        Section("round", "all", lambda: snapshot.session.state_dict() | of_client),
        Section("inner", "all", lambda: trainer.step.state_dict() if client else {}),
        Section("statistics", "all", lambda: statistics),
        Section("local", "rank", trainer.local_tensors.state_dict),
        Section("buffers", "rank", lambda: dict(model.module.named_buffers())),
        Section("tally", "rank", snapshot.accumulator.state_dict),
        Section("work", "rank", lambda: client.result.state_dict() if client else {}),
        Section("gradients", "rank", lambda: trainer.step.gradient_reducer.state_dict() if client else {}),
        Section("seconds", "rank", lambda: snapshot.seconds),
    ]


def _trees(sections: Sequence[Section], *scopes: Scope) -> dict[str, Any]:
    return {section.name: section.state() for section in sections if section.scope in scopes}


def _restore_round(state: TrainState, saved: SavedParts) -> Tree:
    """Restore a checkpoint between two rounds, but for the local tensors, which are returned.

    Clients' states are found wherever their silos were.
    """
    topology = state.run.topology.of_launch

    def load_shards(name: str, wanted: Callable[[str], bool] = bool) -> list[Tree]:
        there, own = saved.saved.shards, f"silo-{topology.silo}.replica-{topology.silo_rank}"
        shards = [own] if _is_same_world(state) else there
        return [saved.saved.load_shard(shard, f"own/{name}", wanted) for shard in shards if shard in there]

    for section in [*_common_sections(state)[:1], *_round_sections(state), *_common_sections(state)[1:]]:
        if section.load is None:
            continue
        if section.scope == "rank":
            section.load(load_shards(section.name, section.wanted))
        else:
            section.load(saved.load(section.name, section.wanted))
    state.algorithm.load_state_dict(saved.load("algorithm"))
    # In another world each rank continues with those of the first.
    return next(iter(load_shards("local")), {})


def _restore_snapshot(state: TrainState, saved: SavedParts, rank_states: list[dict[str, Any]]) -> RoundSnapshot:
    """Restore the middle of a round, but for what the warm-up of DDP changes."""
    trainer, topology = state.trainer, state.run.topology
    for section in _common_sections(state):
        if section.load and section.scope == "rank":
            section.load([own[section.name] for own in rank_states])
        elif section.load:
            section.load(saved.load(section.name, section.wanted))
    _copy_into(dict(state.model.named_trainable), saved.load("model"))
    statistics = saved.load("statistics")
    trainer.statistics.vector, trainer.statistics.counts = statistics["vector"], statistics["counts"]
    state.algorithm.load_state_dict(saved.load("algorithm"))
    round, of_round = state.run.sample_round(state.progress.rounds), saved.load("round")
    session = state.algorithm.load_round(round, of_round)
    if inner := saved.load("inner"):
        trainer.step.load_state_dict(inner)
    accumulator = RoundAccumulator(state.run, round, state.model.statistics)
    accumulator.load_state_dicts([own["tally"] for own in rank_states], topology.silo_rank)
    snapshot = RoundSnapshot(session, accumulator, None, rank_states[0]["seconds"])
    results = [client_result_from_state(own["work"]) for own in rank_states if own["work"]]
    if results:
        result = results[0] if len(results) == 1 else merge_client_results(results, topology.silo_rank)
        snapshot.client = ClientTraining(result, session.load_client(of_round))
    return snapshot


def _restore_after_warm_up(state: TrainState, rank_states: list[dict[str, Any]]) -> None:
    """Restore buffers, pooled if the number of replicas has changed, and the gradients that were held back."""
    trainer, model = state.trainer, state.model
    pooled, found = (model.statistics, model.personal_statistics), []
    for own in reversed(rank_states):  # what is not pooled stays that of the first
        load_buffers(model.module, own["buffers"])
        found.append([(statistics.vector(), statistics.counts()) for statistics in pooled])
    if len(rank_states) > 1:
        for statistics, parts in zip(pooled, zip(*found, strict=True), strict=True):
            vectors, counts = map(torch.stack, zip(*parts, strict=True))
            statistics.load(vectors.mean(0), counts.amax(0))
    trainer.local_tensors.load_state_dict(rank_states[0]["local"])
    reducer = trainer.step.gradient_reducer
    if states := [own["gradients"] for own in rank_states if own["gradients"]]:
        reducer.load_state_dict(reducer.reshard(states))


def _is_same_world(state: TrainState) -> bool:
    topology = state.run.topology.of_launch
    return (state.progress.silo_sizes, state.progress.silo_dims) == (list(topology.silo_sizes), _dims(topology))


def _dims(topology: Topology) -> list[int]:
    return [topology.dims.shard, topology.dims.tensor]


def _shards_of_rank(saved: SavedState, topology: Topology) -> Sequence[str]:
    """Return the shard that this rank has written, or all of them if the number of ranks has changed."""
    own = f"replica-{topology.silo_rank}-of-{topology.silo_size}"
    if own in saved.shards:
        return [own]
    return [saved.shards[topology.silo_rank]] if len(saved.shards) == topology.silo_size else saved.shards


def _has_trained(state: TrainState) -> bool:
    """Return whether this silo has trained before. Who trains when is a pure function, and need not be saved."""
    run, silo, rounds = state.run, state.run.topology.silo, state.progress.rounds
    if run.eval.personal_steps and run.homes[silo] and any(map(run.evaluates, range(rounds))):
        return True
    earlier = map(run.sample_round, range(rounds + (state.progress.unevaluated_metrics is not None)))
    return any(run.assignments(round)[silo] for round in earlier)


@torch.no_grad()
def _copy_into(tensors: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Copy saved tensors into the live ones, of which other objects hold views."""
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
