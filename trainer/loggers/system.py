"""The load of the machine, beside the metrics of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from trainer.loggers.base import FinalArtifacts, Logger, Metrics, StepLogger, TextLogger, TextSample

MIN_SECONDS = 1.0  # between measurements: a short round pays for none


class SystemLogger:
    """Logger that adds the load of its machine to what it passes on to other loggers, at most once a second.

    Args:
        loggers: where everything goes.
        measure: returns the load by name.
    """

    def __init__(self, loggers: Sequence[Logger], measure: Callable[[], dict[str, float]]):
        self._loggers, self._measure = loggers, measure
        self._next = monotonic()
        measure()  # the processors' is that since the last call

    def log_round(self, metrics: Metrics) -> None:
        load: Metrics = {}
        if monotonic() >= self._next:
            load = {f"system/{name}": value for name, value in self._measure().items()}
            self._next = monotonic() + MIN_SECONDS
        for logger in self._loggers:
            logger.log_round(metrics | load)

    def log_step(self, metrics: Metrics) -> None:
        for logger in self._loggers:
            if isinstance(logger, StepLogger):
                logger.log_step(metrics)

    def log_samples(self, round: int, samples: Sequence[TextSample]) -> None:
        for logger in self._loggers:
            if isinstance(logger, TextLogger):
                logger.log_samples(round, samples)

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        for logger in self._loggers:
            logger.finalize(result, artifacts)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
