"""Charts of a run in TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.loggers.base import FinalArtifacts, Metrics

if TYPE_CHECKING:  # tensorboard and matplotlib are imported when there is something to write
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from trainer.loggers.tensorboard_hparams import Scalar

MAX_CLASSES_WITH_COUNTS = 40  # in a confusion matrix; the cells of more classes are too small for numbers


class TensorBoardLogger:
    """Logger that writes a scalar per metric and round to TensorBoard's event files.

    At the end it adds the final scores, the confusion matrix (figure `test/confusion`), and a text sample
    (`test/sample`). The HParams tab shows the run from its first round on.

    folder: where event files go; created with the first of them. Charts of single clients go to `<folder>-clients`: the
        HParams tab has a column for every chart of a folder, and there may be thousands of clients.
    hyperparameters: flat; None is shown as null.
    purge_round: for a resumed run, the first round that is run again. Older events from it on are hidden.
    """

    def __init__(self, folder: Path, hyperparameters: Mapping[str, Scalar], purge_round: int | None = None) -> None:
        self._folder = folder
        self._hyperparameters = dict(hyperparameters)
        self._purge_round = purge_round
        self._last: Metrics = {"round": max(0, (purge_round or 0) - 1)}

    @cached_property
    def _writer(self) -> SummaryWriter:
        from trainer.loggers.tensorboard_hparams import session_start

        writer = self._open(self._folder)
        writer._get_file_writer().add_summary(session_start(self._hyperparameters), 0)
        return writer

    @cached_property
    def _client_writer(self) -> SummaryWriter:
        return self._open(self._folder.with_name(f"{self._folder.name}-clients"))

    def _open(self, folder: Path) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=self._purge_round)

    def log_round(self, metrics: Metrics) -> None:
        """Write the metrics and flush, so that an open page shows the round and a kill does not lose it."""
        step = int(metrics["round"])
        for tag, value in metrics.items():
            if tag != "round":
                writer = self._client_writer if tag.startswith("client/") else self._writer
                writer.add_scalar(tag, value, step)
        self._flush()
        self._last = dict(metrics)

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Write the scores of the result and the artifacts at the last round.

        Scores are the numbers with a group in their names, such as `test/accuracy`, that differ from the last round's.
        A name without a group, such as `seconds`, means a round in the charts and the whole run in the result.
        """
        from trainer.loggers.tensorboard_hparams import session_end

        step = int(self._last["round"])
        for tag, value in result.items():
            if "/" in tag and _is_number(value) and self._last.get(tag) != value:
                self._writer.add_scalar(tag, value, step)
        if artifacts.confusion is not None:
            figure = confusion_figure(artifacts.confusion, artifacts.label_names)
            self._writer.add_figure("test/confusion", figure, step)
        if artifacts.sample:
            # TensorBoard renders Markdown, in which an indent of four spaces means verbatim text.
            verbatim = textwrap.indent(artifacts.sample, "    ", predicate=lambda line: True)
            self._writer.add_text("test/sample", verbatim, step)
        self._writer._get_file_writer().add_summary(session_end(), step)
        self._flush()

    def close(self) -> None:
        for writer in self._open_writers():
            writer.close()

    def _flush(self) -> None:
        for writer in self._open_writers():
            writer.flush()

    def _open_writers(self) -> list[SummaryWriter]:
        """Return the writers made so far; asking for the properties would create files."""
        return [vars(self)[name] for name in ("_writer", "_client_writer") if name in vars(self)]


def confusion_figure(confusion: Tensor, label_names: tuple[str, ...] = ()) -> Figure:
    """Draw a confusion matrix, true classes down and predictions across.

    The color of a cell is its share of the row, which shows rare classes as well as common ones. The row of a class
    without examples is white. Cells contain their counts for up to 40 classes.

    Args:
        confusion: int64 [classes, classes].
        label_names: a name per class; empty for the numbers of the classes.
    """
    from matplotlib.figure import Figure

    classes = len(confusion)
    names = label_names or tuple(map(str, range(classes)))
    assert confusion.shape == (classes, classes) and len(names) == classes, (confusion.shape, names)
    has_counts = classes <= MAX_CLASSES_WITH_COUNTS
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    digits = len(str(int(confusion.max())))
    side = 2.0 + classes * max(0.4, 0.09 * digits) if has_counts else 8.0  # inches
    figure = Figure((side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="prediction", ylabel="truth")
    if has_counts:
        axes.set_xticks(range(classes), names, rotation="vertical")
        axes.set_yticks(range(classes), names)
        for row, column in product(range(classes), repeat=2):
            color = "white" if shares[row][column] > 0.5 else "black"
            count = str(int(confusion[row, column]))
            axes.text(column, row, count, color=color, fontsize="small", ha="center", va="center")
    return figure


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
