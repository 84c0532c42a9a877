"""The middle of a round."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.algorithms.base import RoundSession
from trainer.loop.local_trainer import ClientTraining
from trainer.loop.round_metrics import RoundAccumulator


@dataclass
class RoundSnapshot:
    """The work that a silo has done of a round.

    Attributes:
        session: the algorithm's session, with the sums of the clients that have finished.
        accumulator: sums for the round's metrics.
        client: the client in training, if there is one.
        seconds: the time since the round began, over all starts.
    """

    session: RoundSession
    accumulator: RoundAccumulator
    client: ClientTraining | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """The silo's steps of this round so far."""
        in_training = [self.client.result] if self.client else []
        return sum(result.steps for result in [*self.accumulator.results, *in_training])
