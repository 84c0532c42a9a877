"""Control of the loop from outside: requests to save or to stop, and the activity that the heartbeat reports.

The replicas of a silo must act on the same step: they reach a consensus without waiting for each other. Silos need not.
"""

from __future__ import annotations

from enum import IntEnum
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from trainer.distributed import collectives
from trainer.distributed.topology import Topology

if TYPE_CHECKING:
    from trainer.algorithms.client_result import ClientResult

CONSENSUS_INTERVAL_SECONDS = 0.25


class Action(IntEnum):
    """An action after a step; of several requests the greatest counts."""

    CONTINUE = 0
    CHECKPOINT = 1
    END_ROUND = 2  # its deadline has passed
    STOP = 3


class LoopControl:
    """The requests to this process, and its activity. Signals and threads write, the loop reads.

    Args:
        checkpoint_seconds: time between mid-round checkpoints; None: there are none.
        max_seconds: time after which to stop; None: never.

    Attributes:
        round_deadline: reading of `perf_counter` at which this silo ends its round, whatever is left to do.
        training_deadline: reading at which the time of the whole run is over, which then ends with the round.
    """

    def __init__(self, checkpoint_seconds: float | None = None, max_seconds: float | None = None):
        began = perf_counter()
        self.checkpoint_seconds = float("inf") if checkpoint_seconds is None else checkpoint_seconds
        self.run_deadline = float("inf") if max_seconds is None else began + max_seconds
        self.checkpointed_at = began
        self.round_deadline = self.training_deadline = float("inf")
        self.stop_requested = False
        self.phase, self.result, self.clients_begun = "starting", None, 0

    def request_stop(self) -> None:
        """Ask to stop at the next opportunity. Safe in any thread."""
        self.stop_requested = True

    def requested_action(self) -> Action:
        """Return what this process is asked to do now."""
        now = perf_counter()
        if self.stop_requested or now > self.run_deadline:
            return Action.STOP
        if now > self.round_deadline:
            return Action.END_ROUND
        return Action.CHECKPOINT if now - self.checkpointed_at > self.checkpoint_seconds else Action.CONTINUE

    def restart_checkpoint_timer(self) -> None:
        """Restart the time to the next mid-round checkpoint."""
        self.checkpointed_at = perf_counter()

    def set_activity(self, phase: str, result: ClientResult | None = None) -> None:
        """Set what is being done, for the heartbeat."""
        self.phase, self.result = phase, result
        self.clients_begun += result is not None

    @property
    def has_stepped(self) -> bool:
        """Whether this process has made a step."""
        return self.clients_begun > (self.result is not None and self.result.steps == 0)

    def activity(self) -> str:
        """Return what is being done, for people, such as "round 3: training client 1, step 17"."""
        result = self.result
        return f"{self.phase} client {result.client}, step {result.steps}" if result else self.phase


class ActionConsensus:
    """Agrees on an action for all replicas of a silo: the greatest that is requested, on the same step everywhere.

    It takes one small all-reduce every quarter of a second, started after one step and read some steps later, so that
    nobody waits for it. Replica 0 decides the number of steps.
    """

    def __init__(self, topology: Topology, control: LoopControl):
        self.topology, self.control = topology, control
        self.period = self.countdown = 1
        self.began = perf_counter()
        self.proposal, self.pending = torch.zeros(2, dtype=torch.int64), None

    def poll(self) -> Action:
        """Return what all replicas do now. Each calls it after every step."""
        if self.topology.silo_size == 1:
            return self._apply(self.control.requested_action())
        self.countdown -= 1
        return Action.CONTINUE if self.countdown else self._exchange()

    def flush(self) -> None:
        """Discard the exchange under way, which all replicas have started: it belongs to a round that is over."""
        if self.pending:
            self.pending.wait()
            self.pending = None
        self.period = self.countdown = 1
        self.began = perf_counter()

    def _exchange(self) -> Action:
        agreed, now = Action.CONTINUE, perf_counter()
        steps = max(1, round(CONSENSUS_INTERVAL_SECONDS * self.period / (now - self.began)))
        if self.pending:
            self.pending.wait()
            action, self.period = self.proposal.tolist()
            agreed = self._apply(Action(action))
        self.began, self.countdown = now, self.period
        self.proposal = torch.tensor([self.control.requested_action(), steps if self.topology.is_leader else 0])
        self.pending = collectives.all_reduce_max_in_silo_async(self.proposal, self.topology)
        return agreed

    def _apply(self, action: Action) -> Action:
        if action is Action.CHECKPOINT:
            self.control.restart_checkpoint_timer()
        return action
