"""Steps of the run's own silos, each replica beside its peers: what averaging gradients takes of them."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from trainer.commands.plan.dry_run import MIN_ROUNDS, train_for
from trainer.distributed.topology import Topology
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState


def measure_step_seconds(run: Run, topology: Topology, seconds: float) -> float:
    """The median seconds of a step of this rank's silo, over clients that train for so long together. A collective."""
    state = TrainState(replace(run, topology=topology))
    round = run.round(min(run.length.sync_rounds, run.rounds - 1))
    clients = run.assignments(round)[topology.silo] or round.cohort or range(len(run.training_sets))
    session = state.algorithm.start_round(round)
    train_for(0.0, state, session, round, clients[0])  # the first steps are slow
    played = [train_for(seconds / MIN_ROUNDS, state, session, round, clients[0]) for _ in range(MIN_ROUNDS)]
    return median(spent / client.result.steps for client, spent in played)
