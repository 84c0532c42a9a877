"""TensorBoardLogger's event file and the summaries in it.

Imports tensorboard at its top, which costs 0.1 s and 6 MB: import this module when there is something to write.
"""

# The classes of protobuf's generated modules exist only at run time.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import struct
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

Scalar = str | bool | int | float | None


class EventFile:
    """A new event file in a folder, which hides the rounds from purge_round on in the folder's older files."""

    def __init__(self, folder: Path, purge_round: int | None) -> None:
        self._writer = EventFileWriter(str(folder))
        if purge_round is not None:
            restart = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=purge_round, session_log=restart))

    def write(self, values: Iterable[Summary.Value], step: int) -> None:
        """Append one event that holds all values, and flush it, so that an open page shows it and a kill keeps it."""
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def scalars(metrics: Mapping[str, float | int]) -> list[Summary.Value]:
    """A scalar a metric, float32, tagged with its key."""
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]


def image(tag: str, png: bytes) -> Summary.Value:
    """An image that is already PNG, as RGBA."""
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first in every PNG
    return Summary.Value(
        tag=tag, image=Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    )


def text(tag: str, sample: str) -> Summary.Value:
    """A text shown as it is, line by line: TensorBoardLogger renders Markdown, in which four spaces mean verbatim."""
    verbatim = textwrap.indent(sample, "    ", predicate=lambda line: True)
    return Summary.Value(
        tag=tag,
        metadata=text_metadata.create_summary_metadata(display_name=tag, description=""),
        tensor=make_tensor_proto([verbatim.encode()], dtype=DT_STRING),
    )


def session_start(hyperparameters: Mapping[str, Scalar]) -> Summary.Value:
    """What the HParams tab needs at the start: this run's hyperparameters.

    Its columns are left to TensorBoardLogger. Where a run says what they are, those of any one run are taken for all; without
    that they are those of all runs together, with the ones that differ first.
    """
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters.items():
        setattr(start.hparams[name], *_field(value))
    return _hparams(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start))


def session_end() -> Summary.Value:
    """What the HParams tab needs at the end of a run that succeeded."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _hparams(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _hparams(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary.Value:
    return Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)


def _field(value: Scalar) -> tuple[str, bool | float | str]:
    """The field of a protobuf Value and what it holds; the page's JSON has no NaN and infinity, so they are words."""
    if isinstance(value, bool):
        return "bool_value", value
    if isinstance(value, int | float) and math.isfinite(value):
        return "number_value", float(value)
    return "string_value", "null" if value is None else str(value)
