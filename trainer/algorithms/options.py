"""The choices that all federated algorithms share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch

from trainer.algorithms.base import ClientOptimizerState, Setting, T
from trainer.models.flat import BatchNormReduction
from trainer.optim.optimizers import OptimizerFactory

Weighting = Literal["examples", "equal", "capped"]

mean: OptimizerFactory = partial(torch.optim.SGD, lr=1.0)


@dataclass(frozen=True)
class FederatedOptions:
    """Choices of federated algorithms. Abstract: it has no training of its own.

    Attributes:
        server: makes the server optimizer, an elementwise torch optimizer, for the vector of global parameters.
        weighting: of a client in the mean. `examples`: n_k, its number of training examples or the sum of their
            weights; `equal`: 1; `capped`: n_k, but at most `max_weight`.
        shared_params: regular expression; parameters and buffers whose names it finds are combined, the others are
            personal and stay with their client. `.*` is all, `$^` none.
        client_optimizer_state: `reset` a client's optimizer between its rounds, or `keep` its state.
        batchnorm_stats: combine BatchNorm's statistics `pooled` as those of all examples, or as their plain `mean`.
    """

    server: OptimizerFactory = mean
    weighting: Weighting = "examples"
    max_weight: int | None = None
    shared_params: str = ".*"
    client_optimizer_state: ClientOptimizerState = "reset"
    batchnorm_stats: BatchNormReduction = "pooled"

    def __post_init__(self):
        choices = {
            "weighting": Weighting,
            "client_optimizer_state": ClientOptimizerState,
            "batchnorm_stats": BatchNormReduction,
        }
        for name, valid in choices.items():
            if getattr(self, name) not in get_args(valid):
                raise ValueError(f"algorithm.{name}={getattr(self, name)}\n  valid: {', '.join(get_args(valid))}")
        given = self.max_weight
        if (self.weighting == "capped") != (given is not None) or (given is not None and given < 1):
            raise ValueError(
                f"algorithm.weighting={self.weighting} with algorithm.max_weight={'null' if given is None else given}\n"
                "  valid: weighting=capped with a max_weight from 1, or another weighting with max_weight=null"
            )
        re.compile(self.shared_params)

    @property
    def moves_global_model(self) -> bool:
        return False

    @property
    def has_personal(self) -> bool:
        """Whether some parameters or buffers are personal."""
        return self.shared_params != ".*"

    def is_shared(self, name: str) -> bool:
        return re.search(self.shared_params, name) is not None

    def merge_clients(self, values: Sequence[T], merge: Callable[[Sequence[T]], T]) -> Sequence[T]:
        return values

    def weight_of(self, examples: float) -> float:
        """Return the weight in the mean of a client with this n_k."""
        if self.weighting == "equal":
            return 1.0
        return float(examples if self.max_weight is None else min(examples, self.max_weight))

    def total_weight(self, examples: Iterable[float]) -> float:
        """Return the weight in the mean of all clients with these n_k."""
        return math.fsum(map(self.weight_of, examples))

    def compression_error(self, setting: Setting, is_compressible: bool) -> list[str]:
        """Return what is wrong with compressing updates, if they are compressed and cannot be."""
        if setting.compression is None or is_compressible:
            return []
        return [
            f"update_compression={setting.compression} with an algorithm that sends something else than sums of "
            "updates, such as median or averaging.\n  set update_compression=fp32, or algorithm=fedavg"
        ]


def raise_errors(errors: list[Any]) -> None:
    """Raise one ValueError for all errors, if there are any."""
    if errors:
        raise ValueError("\n".join(errors))
