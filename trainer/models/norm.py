"""The layers that normalise features."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["none", "batch", "group"]


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The layer that normalises so many channels, `group` those of 8 each; one that does nothing for `none`."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(channels // 8, 1), channels) if norm == "group" else nn.Identity()
