"""The rounds of a run as charts in TensorBoardLogger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.loggers.base import FinalArtifacts, Metrics
from trainer.loggers.confusion_matrix import confusion_png

if TYPE_CHECKING:
    from trainer.loggers.tensorboard_events import EventFile, Scalar


class TensorBoardLogger:
    """A sink that writes one event a round, a scalar for every metric, on the step `round`.

    At the end it adds the final metrics, the confusion matrix (image `test/confusion`), the text sample
    (`test/sample`), and a heat map, client by round, of every figure that single clients were evaluated by (image
    `clients/test_accuracy`). The HParams tab shows the run from its first round on.

    folder: where the event files go; made when it is not there. Charts of single clients go to a folder beside it,
    `<folder>-clients`, because the HParams tab has a column for every chart of a run, and there may be thousands.
    hyperparameters: flat; None is shown as null.
    purge_round: of a resumed run, the first round that is run again: older events from there on are hidden.
    history: gives the metrics of all the run's rounds in order, also of those before it was resumed; called once, at
    the end, so that no round pays for the heat maps. A value may be None.
    """

    def __init__(
        self,
        folder: Path,
        hyperparameters: Mapping[str, Scalar],
        purge_round: int | None = None,
        history: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        self._folder = folder
        self._hyperparameters = dict(hyperparameters)
        self._purge_round = purge_round
        self._history = history
        self._last: Metrics = {"round": max(0, (purge_round or 0) - 1)}

    @cached_property
    def _client_events(self) -> EventFile:
        from trainer.loggers import tensorboard_events

        return tensorboard_events.EventFile(self._folder.with_name(f"{self._folder.name}-clients"), self._purge_round)

    @cached_property
    def _events(self) -> EventFile:
        from trainer.loggers import tensorboard_events

        file = tensorboard_events.EventFile(self._folder, self._purge_round)
        file.write([tensorboard_events.session_start(self._hyperparameters)], step=0)
        return file

    def log_round(self, metrics: Metrics) -> None:
        from trainer.loggers import tensorboard_events

        of_clients = {key: value for key, value in metrics.items() if key.startswith("client/")}
        values = {key: value for key, value in metrics.items() if key != "round" and key not in of_clients}
        self._events.write(tensorboard_events.scalars(values), step=int(metrics["round"]))
        if of_clients:
            self._client_events.write(tensorboard_events.scalars(of_clients), step=int(metrics["round"]))
        self._last = dict(metrics)

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Write the measures of the result and the exhibits at the last round.

        A measure is a number with a group in its name, such as `test/accuracy`. Names without one, such as
        `seconds`, mean a round in the charts and the run in the result: they stay out.
        """
        from trainer.loggers import tensorboard_events

        measures = {key: value for key, value in result.items() if "/" in key and _is_number(value)}
        news = {key: value for key, value in measures.items() if self._last.get(key) != value}
        values = [*tensorboard_events.scalars(news), tensorboard_events.session_end()]
        if artifacts.confusion is not None:
            values.append(
                tensorboard_events.image("test/confusion", confusion_png(artifacts.confusion, artifacts.label_names))
            )
        if artifacts.sample:
            values.append(tensorboard_events.text("test/sample", artifacts.sample))
        values += [tensorboard_events.image(tag, png) for tag, png in self._heat_maps().items()]
        self._events.write(values, step=int(self._last["round"]))

    def _heat_maps(self) -> dict[str, bytes]:
        from trainer.loggers import client_history, heatmap

        figures = client_history.client_metrics(self._history())
        return {f"clients/{figure.name}": heatmap.heat_map_png(figure) for figure in figures}

    def close(self) -> None:
        for name in self.__dict__.keys() & {"_events", "_client_events"}:  # closing must not make a file
            getattr(self, name).close()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
