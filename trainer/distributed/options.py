"""Options of a silo. The configuration has the same keys, which conf/config.yaml documents. Needs no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic.dataclasses import dataclass

from trainer.utils.annotations import OPTIONS, PositiveInt


@dataclass(frozen=True, config=OPTIONS)
class SiloOptions:
    """How a silo holds its model.

    Attributes:
        shard: the ranks over which parameters, gradients and the optimizer's state are divided; `full`: all of the
            silo; `node`: those on one node.
        tensor: the ranks over which layers are divided.
        units: the modules whose parameters are gathered together, as a regular expression of their names; `auto`: the
            members of the model's lists of layers.
        keep_gathered: whether a unit stays gathered between forward and backward.
        recompute: whether units keep only their inputs, and compute again in the backward pass.
    """

    shard: PositiveInt | Literal["full", "node"] = 1
    tensor: PositiveInt = 1
    units: Literal["auto"] | re.Pattern[str] = "auto"
    keep_gathered: bool = False
    recompute: bool = False
