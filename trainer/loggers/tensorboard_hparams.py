"""Summaries of TensorBoard's HParams tab.

`torch.utils.tensorboard` cannot write these: it stores booleans as numbers, drops None, and fixes the tab's columns.
"""

# The classes of protobuf's generated modules exist only at run time.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

Scalar = str | bool | int | float | None


def session_start(hyperparameters: Mapping[str, Scalar]) -> Summary:
    """Make the summary that starts a run: its hyperparameters.

    The tab's columns are not part of it. TensorBoard then infers them from all runs together and puts the ones that
    differ first; columns written by one run would be used for all.
    """
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in hyperparameters.items():
        setattr(start.hparams[name], *_field(value))
    return _summary(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start))


def session_end() -> Summary:
    """Make the summary that ends a successful run."""
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))


def _summary(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def _field(value: Scalar) -> tuple[str, bool | float | str]:
    """Return the field of a protobuf Value and its content.

    NaN and infinity become strings: the page's JSON has neither.
    """
    if isinstance(value, bool):
        return "bool_value", value
    if isinstance(value, int | float) and math.isfinite(value):
        return "number_value", float(value)
    return "string_value", "null" if value is None else str(value)
