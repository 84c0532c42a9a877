"""Charts of a run in TensorBoard."""

# The classes of protobuf's generated modules exist only at run time.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.loggers.base import FinalArtifacts, Metrics, TextSample
from trainer.utils.disk import naming_disk

if TYPE_CHECKING:  # tensorboard and matplotlib are imported when there is something to write
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

Scalar = str | bool | int | float | None

MAX_CLASSES_WITH_COUNTS = 40  # in a confusion matrix; the cells of more classes are too small for numbers


class TensorBoardLogger:
    """Logger that writes a scalar per metric and round to TensorBoard's event files.

    Samples of prompts are texts `sample/1`, `sample/2`. At the end it adds the final scores, the confusion matrix
    (figure `test/confusion`), and a text sample (`test/sample`). The HParams tab shows the run from its first round on.

    folder: where event files go; created with the first of them. Charts of single clients go to `<folder>-clients`: the
        HParams tab has a column for every chart of a folder, and there may be thousands of clients.
    hyperparameters: flat; None is shown as null.
    purge_round: for a resumed run, the first round that is run again. Older events from it on are hidden.
    purge_step: likewise the first step.

    Charts of single steps go to `<folder>-steps`, because the numbers of steps are others than those of rounds.
    """

    def __init__(
        self,
        folder: Path,
        hyperparameters: Mapping[str, Scalar],
        purge_round: int | None = None,
        purge_step: int | None = None,
    ) -> None:
        self._folder = folder
        self._hyperparameters = dict(hyperparameters)
        self._purge_round, self._purge_step = purge_round, purge_step
        self._last: Metrics = {"round": max(0, (purge_round or 0) - 1)}

    @cached_property
    def _writer(self) -> SummaryWriter:
        from tensorboard.plugins.hparams import summary_v2

        writer = self._open(self._folder, self._purge_round)
        # torch's add_hparams would fix the tab's columns by this run: TensorBoard infers them from all runs together.
        start = summary_v2.hparams_pb({name: _readable(value) for name, value in self._hyperparameters.items()}, "")
        writer._get_file_writer().add_summary(start, 0)
        return writer

    @cached_property
    def _client_writer(self) -> SummaryWriter:
        return self._open(self._folder.with_name(f"{self._folder.name}-clients"), self._purge_round)

    @cached_property
    def _step_writer(self) -> SummaryWriter:
        return self._open(self._folder.with_name(f"{self._folder.name}-steps"), self._purge_step)

    def _open(self, folder: Path, purge_step: int | None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # charts of single clients are for their owner
        return SummaryWriter(str(folder), purge_step=purge_step)

    def log_round(self, metrics: Metrics) -> None:
        """Write the metrics and flush, so that an open page shows the round and a kill does not lose it."""
        step = int(metrics["round"])
        with naming_disk(self._folder):
            for tag, value in metrics.items():
                if tag != "round":
                    writer = self._client_writer if tag.startswith("client/") else self._writer
                    writer.add_scalar(tag, value, step)
            self._flush()
        self._last = dict(metrics)

    def log_samples(self, round: int, samples: Sequence[TextSample]) -> None:
        """Write the prompts with their continuations."""
        with naming_disk(self._folder):
            for number, sample in enumerate(samples, start=1):
                self._writer.add_text(f"sample/{number}", _verbatim(sample.prompt + sample.text), round)
            self._flush()

    def log_step(self, metrics: Metrics) -> None:
        """Write the metrics of a step; they are flushed with those of its round."""
        with naming_disk(self._folder):
            for tag, value in metrics.items():
                if tag not in ("round", "step"):
                    self._step_writer.add_scalar(tag, value, int(metrics["step"]))

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Write the scores of the result and the artifacts at the last round.

        Scores are the numbers with a group in their names, such as `test/accuracy`, that differ from the last round's.
        A name without a group, such as `seconds`, means a round in the charts and the whole run in the result.
        """
        step = int(self._last["round"])
        with naming_disk(self._folder):
            for tag, value in result.items():
                if "/" in tag and _is_number(value) and self._last.get(tag) != value:
                    self._writer.add_scalar(tag, value, step)
            if artifacts.confusion is not None:
                figure = confusion_figure(artifacts.confusion, artifacts.label_names)
                self._writer.add_figure("test/confusion", figure, step)
            if artifacts.sample:
                self._writer.add_text("test/sample", _verbatim(artifacts.sample), step)
            self._writer._get_file_writer().add_summary(_end_of_session(), step)
            self._flush()

    def close(self) -> None:
        with naming_disk(self._folder):
            for writer in self._open_writers():
                writer.close()

    def _flush(self) -> None:
        for writer in self._open_writers():
            writer.flush()

    def _open_writers(self) -> list[SummaryWriter]:
        """Return the writers made so far; asking for the properties would create files."""
        return [vars(self)[name] for name in ("_writer", "_client_writer", "_step_writer") if name in vars(self)]


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
        # A name is no formula, though it may have dollar signs.
        axes.set_xticks(range(classes), names, rotation="vertical", parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
        for row, column in product(range(classes), repeat=2):
            color = "white" if shares[row][column] > 0.5 else "black"
            count = str(int(confusion[row, column]))
            axes.text(column, row, count, color=color, fontsize="small", ha="center", va="center")
    return figure


def _verbatim(text: str) -> str:
    """Indent a text: TensorBoard renders Markdown, in which four spaces mean that it is shown as it is."""
    return textwrap.indent(text, "    ", predicate=lambda line: True)


def _end_of_session() -> Summary:
    """Make the summary that ends a successful run in the HParams tab."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
    return Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data, tensor=metadata.NULL_TENSOR)])


def _readable(value: Scalar) -> str | bool | int | float:
    """Return the value, None and what is not finite as text: the page's JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "null" if value is None else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
