"""Metrics of single steps, so that a curve shows the inside of a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from trainer.loggers import Logger, StepLogger
from trainer.loop.train_state import TrainState


class StepMetrics:
    """The callback that logs one of `every` steps of rank 0. At the other steps it counts, and waits for nothing.

    Args:
        state: of the run.
        loggers: those of the run, some of which take steps.
        every: steps from one that is logged to the next.
        steps: of the round that were made before this start.
    """

    def __init__(self, state: TrainState, loggers: Sequence[Logger], every: int, steps: int = 0):
        self.state, self.every = state, every
        self.loggers = [logger for logger in loggers if isinstance(logger, StepLogger)]
        self.round, self.steps = state.progress.rounds, steps
        self.examples, self.began = 0, perf_counter()

    def __call__(self, done: float, examples: int, loss: Callable[[], float]) -> None:
        """Count a step, and log it if it is due.

        Args:
            done: fraction of the run.
            examples: of the step in this silo.
            loss: returns the mean loss of the step on this rank. Waits for the device.
        """
        progress = self.state.progress
        if progress.rounds != self.round:
            self.round, self.steps = progress.rounds, 0
        self.steps += 1
        self.examples += examples
        if self.steps % self.every:
            return
        mean_loss, now = loss(), perf_counter()
        silos = self.state.run.topology.num_silos  # taken to be as fast as this one
        metrics = {
            "round": self.round + 1,
            "step": progress.steps + self.steps,
            "train/loss": mean_loss,
            "train/learning_rate": self.state.trainer.step.learning_rate,
            "examples_per_second": silos * self.examples / max(now - self.began, 1e-9),
        }
        self.examples, self.began = 0, now
        for logger in self.loggers:
            logger.log_step(metrics)
