"""The middle of a round: what a silo has done of it, saved without a word to the other silos, and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.algorithms.base import RoundSession
from trainer.algorithms.client_result import merged, work_of
from trainer.checkpoint import Checkpoints, Start
from trainer.checkpoint.format import Saved
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.round_metrics import Tally
from trainer.loop.train_state import State
from trainer.models.flat import Statistics


@dataclass
class Inside:
    """What a silo has done of a round: its sums, the client that it is at, if any, and the seconds it took."""

    session: RoundSession
    tally: Tally
    client: ClientTraining | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """The silo's steps of this round so far."""
        return sum(work.steps for work in [*self.tally.works, *([self.client.result] if self.client else [])])


def save_inside(state: State, checkpoints: Checkpoints, inside: Inside) -> None:
    """Begins to write this silo's section of the round: all that it needs to go on from this step."""
    algorithm, trainer, client = state.algorithm, state.trainer, inside.client
    vector, counts = trainer.statistics
    # Without a vote, what the client being trained keeps is the optimizer's state itself.
    without = client.result.client if client and not state.run.algorithm.skips_nonfinite_clients else None
    common = {
        "progress": state.totals(),
        "model": dict(state.model.module.named_parameters()),
        "algorithm": algorithm.state_dict(),
        "round": inside.session.state_dict() | (client.session.state_dict() if client else {}),
        "inner": trainer.inner_state() if client else {},
        "fresh": trainer.fresh,
        "clients": state.clients(without),
        "statistics": {"vector": vector, "counts": counts},
        **state.averages(),
    }
    own = {
        "buffers": dict(state.model.module.named_buffers()),
        "tally": inside.tally.state_dict(),
        "work": client.result.state_dict() if client else {},
        "clients": state.own_of_clients(without),
        "gradients": trainer.gradients.state_dict() if client else {},
        "seconds": inside.seconds,
    }
    slices = {"algorithm": algorithm.sharded_state_dict(), **state.residuals()}
    checkpoints.save_section(state.progress.rounds, inside.steps, common, slices, own)


def restore(state: State, start: Start) -> Inside | None:
    """Puts a border back, or the middle of a round, which is returned. A collective of each silo."""
    section = start.sections.get(state.run.topology.silo)
    if section is None:
        assert start.border is not None
        state.restore_border(start.border)
        if _has_trained(state):
            state.trainer.warm_up()
        return None
    owns = _owns(section, state.run.topology.replica, state.run.topology.num_replicas)
    inside = _restore_section(state, section, owns)
    if _has_trained(state) or inside.steps:
        state.trainer.warm_up()
    _restore_own(state, owns)
    return inside


def _restore_section(state: State, saved: Saved, owns: list[dict[str, Any]]) -> Inside:
    trainer, topology = state.trainer, state.run.topology
    state.restore_totals(saved)
    state.restore_averages(saved)
    _copy_into(dict(state.model.module.named_parameters()), saved.load("model"))
    statistics = saved.load("statistics")
    trainer.statistics = (statistics["vector"], statistics["counts"])
    state.algorithm.load_state_dict(saved.load("algorithm"))
    round, of_round = state.run.round(state.progress.rounds), saved.load("round")
    session = state.algorithm.load_round(round, of_round)
    state.restore_clients(saved.load("clients"))
    state.restore_residuals(saved)
    state.restore_own_of_clients([own["clients"] for own in owns])
    trainer.fresh = saved.load("fresh")
    if inner := saved.load("inner"):
        trainer.load_inner_state(inner)
    tally = Tally(state.run, round, state.model.statistics)
    tally.load_state_dicts([own["tally"] for own in owns], topology.replica)
    works = [work_of(own["work"]) for own in owns if own["work"]]
    inside = Inside(session, tally, None, owns[0]["seconds"])
    if works:
        work = works[0] if len(works) == 1 else merged(works, topology.replica)
        inside.client = ClientTraining(work, session.load_client(of_round))
    return inside


def _owns(saved: Saved, replica: int, num_replicas: int) -> list[dict[str, Any]]:
    """What this replica wrote of its own; what all of them wrote, if there were more of them or fewer."""
    mine = f"replica-{replica}-of-{num_replicas}"
    parts = [saved.parts[replica]] if len(saved.parts) == num_replicas else saved.parts
    parts = [mine] if mine in saved.parts else parts
    return [saved.load_of(part, "own") for part in parts]


def _restore_own(state: State, owns: list[dict[str, Any]]) -> None:
    """Puts back what the warm-up has changed: batch statistics, pooled if the replicas were others, and gradients."""
    buffers = dict(state.model.module.named_buffers())
    statistics = Statistics(buffers)
    vectors, counts = [], []
    for own in owns:
        _copy_into(buffers, own["buffers"])
        vectors.append(statistics.vector())
        counts.append(statistics.counts())
    if len(owns) > 1:
        statistics.load(torch.stack(vectors).mean(0), torch.stack(counts).amax(0))
    gradients = state.trainer.gradients
    if states := [own["gradients"] for own in owns if own["gradients"]]:
        gradients.load_state_dict(gradients.redistributed(states))


def _has_trained(state: State) -> bool:
    """Whether this silo has trained since the run began: who trains when is a pure function, and need not be saved."""
    run, silo, rounds = state.run, state.run.topology.silo, state.progress.rounds
    if run.personal_steps and run.homes[silo] and any(map(run.evaluates, range(rounds))):
        return True
    earlier = map(run.round, range(rounds + (state.progress.trained is not None)))
    return any(run.assignments(round)[silo] for round in earlier)


@torch.no_grad()
def _copy_into(tensors: dict[str, Any], saved: dict[str, Any]) -> None:
    """Writes saved tensors into the live ones, which other objects look into."""
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
