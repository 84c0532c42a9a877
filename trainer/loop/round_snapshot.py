"""The middle of a round: what a silo has done of it, saved without a word to the other silos, and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.algorithms.base import RoundSession
from trainer.algorithms.client_result import client_result_from_state, merge_client_results
from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.checkpoint.format import SavedState
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.round_metrics import RoundAccumulator
from trainer.loop.train_state import TrainState
from trainer.models.flat import BufferStatistics


@dataclass
class RoundSnapshot:
    """What a silo has done of a round: its sums, the client that it is at, if any, and the seconds it took."""

    session: RoundSession
    accumulator: RoundAccumulator
    client: ClientTraining | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """The silo's steps of this round so far."""
        return sum(work.steps for work in [*self.accumulator.results, *([self.client.result] if self.client else [])])


def save_round_snapshot(state: TrainState, checkpointer: Checkpointer, snapshot: RoundSnapshot) -> None:
    """Begins to write this silo's section of the round: all that it needs to go on from this step."""
    algorithm, trainer, client = state.algorithm, state.trainer, snapshot.client
    vector, counts = trainer.statistics
    # Without a vote, what the client being trained keeps is the optimizer's state itself.
    without = client.result.client if client and not state.run.algorithm.skips_nonfinite_clients else None
    common = {
        "progress": state.progress_section(),
        "model": dict(state.model.module.named_parameters()),
        "algorithm": algorithm.state_dict(),
        "round": snapshot.session.state_dict() | (client.session.state_dict() if client else {}),
        "inner": trainer.optimizer_state_dict() if client else {},
        "fresh": trainer.initial_personal_state,
        "clients": state.client_states(without),
        "statistics": {"vector": vector, "counts": counts},
        **state.ema_section(),
    }
    own = {
        "buffers": dict(state.model.module.named_buffers()),
        "tally": snapshot.accumulator.state_dict(),
        "work": client.result.state_dict() if client else {},
        "clients": state.rank_client_states(without),
        "gradients": trainer.gradient_reducer.state_dict() if client else {},
        "seconds": snapshot.seconds,
    }
    slices = {"algorithm": algorithm.sharded_state_dict(), **state.transport_section()}
    checkpointer.save_mid_round(state.progress.rounds, snapshot.steps, common, slices, own)


def restore(state: TrainState, resume_point: ResumePoint) -> RoundSnapshot | None:
    """Puts a border back, or the middle of a round, which is returned. A collective of each silo."""
    section = resume_point.mid_round.get(state.run.topology.silo)
    if section is None:
        assert resume_point.round_checkpoint is not None
        state.restore_round_checkpoint(resume_point.round_checkpoint)
        if _has_trained(state):
            state.trainer.warm_up_ddp()
        return None
    owns = _load_rank_states(section, state.run.topology.replica, state.run.topology.num_replicas)
    inside = _restore_mid_round(state, section, owns)
    if _has_trained(state) or inside.steps:
        state.trainer.warm_up_ddp()
    _restore_rank_state(state, owns)
    return inside


def _restore_mid_round(state: TrainState, saved: SavedState, rank_states: list[dict[str, Any]]) -> RoundSnapshot:
    trainer, topology = state.trainer, state.run.topology
    state.restore_progress(saved)
    state.restore_ema(saved)
    _copy_into(dict(state.model.module.named_parameters()), saved.load("model"))
    statistics = saved.load("statistics")
    trainer.statistics = (statistics["vector"], statistics["counts"])
    state.algorithm.load_state_dict(saved.load("algorithm"))
    round, of_round = state.run.round(state.progress.rounds), saved.load("round")
    session = state.algorithm.load_round(round, of_round)
    state.restore_client_states(saved.load("clients"))
    state.restore_transport(saved)
    state.restore_rank_client_states([own["clients"] for own in rank_states])
    trainer.initial_personal_state = saved.load("fresh")
    if inner := saved.load("inner"):
        trainer.load_optimizer_state_dict(inner)
    tally = RoundAccumulator(state.run, round, state.model.statistics)
    tally.load_state_dicts([own["tally"] for own in rank_states], topology.replica)
    works = [client_result_from_state(own["work"]) for own in rank_states if own["work"]]
    inside = RoundSnapshot(session, tally, None, rank_states[0]["seconds"])
    if works:
        work = works[0] if len(works) == 1 else merge_client_results(works, topology.replica)
        inside.client = ClientTraining(work, session.load_client(of_round))
    return inside


def _load_rank_states(saved: SavedState, replica: int, num_replicas: int) -> list[dict[str, Any]]:
    """What this replica wrote of its own; what all of them wrote, if there were more of them or fewer."""
    mine = f"replica-{replica}-of-{num_replicas}"
    parts = [saved.shards[replica]] if len(saved.shards) == num_replicas else saved.shards
    parts = [mine] if mine in saved.shards else parts
    return [saved.load_shard(part, "own") for part in parts]


def _restore_rank_state(state: TrainState, rank_states: list[dict[str, Any]]) -> None:
    """Puts back what the warm-up has changed: batch statistics, pooled if the replicas were others, and gradients."""
    buffers = dict(state.model.module.named_buffers())
    statistics = BufferStatistics(buffers)
    vectors, counts = [], []
    for own in rank_states:
        _copy_into(buffers, own["buffers"])
        vectors.append(statistics.vector())
        counts.append(statistics.counts())
    if len(rank_states) > 1:
        statistics.load(torch.stack(vectors).mean(0), torch.stack(counts).amax(0))
    gradients = state.trainer.gradient_reducer
    if states := [own["gradients"] for own in rank_states if own["gradients"]]:
        gradients.load_state_dict(gradients.reshard(states))


def _has_trained(state: TrainState) -> bool:
    """Whether this silo has trained since the run began: who trains when is a pure function, and need not be saved."""
    run, silo, rounds = state.run, state.run.topology.silo, state.progress.rounds
    if run.personal_steps and run.homes[silo] and any(map(run.evaluates, range(rounds))):
        return True
    earlier = map(run.round, range(rounds + (state.progress.unevaluated_metrics is not None)))
    return any(run.assignments(round)[silo] for round in earlier)


@torch.no_grad()
def _copy_into(tensors: dict[str, Any], saved: dict[str, Any]) -> None:
    """Writes saved tensors into the live ones, which other objects look into."""
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
