"""Drift correction: what SCAFFOLD, FedNova and FedDyn change of federated averaging."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from trainer.algorithms.base import Setting
from trainer.algorithms.client_result import ClientResult
from trainer.utils.text import format_value

if TYPE_CHECKING:
    from trainer.algorithms.fedavg import FedAvg, FedAvgClient, FedAvgRun


class DriftCorrection(Protocol):
    """A choice of correction. A frozen value; `setup` makes what works on one run.

    Attributes:
        keeps_client_state: whether clients keep vectors of the correction between rounds.
        rescales_updates: whether silos sum updates in another unit than that of the parameters.
    """

    keeps_client_state: bool = False
    rescales_updates: bool = False

    def errors(self, algorithm: FedAvg, setting: Setting) -> list[str]:
        """Return the reasons why the correction cannot work with these choices."""
        ...

    def setup(self, run: FedAvgRun) -> Corrector:
        """Return the correction at work on a run."""
        ...


class Corrector:
    """A correction at work. Each overrides the places where it differs from plain averaging, which this one is.

    Attributes:
        vectors: global vectors [n] besides the parameters, by name; equal on all ranks, and saved.
        summed: the names of those vectors that grow, at the end of a round, by what all clients have added to the
            round's sums of the same name.
        client_vectors: names of the vectors [n] that a client keeps between rounds; zeros before its first one.
    """

    vectors: Mapping[str, Tensor] = MappingProxyType({})
    summed: tuple[str, ...] = ()
    client_vectors: tuple[str, ...] = ()

    def start_vectors(self) -> Mapping[str, Tensor]:
        """Return those of the `vectors` that clients begin a round with, which go to every site."""
        return self.vectors

    def start_client(self, client: FedAvgClient) -> None:
        """Add terms to the client's gradients; its vectors are in `client.vectors`."""

    def measure(self, result: ClientResult) -> dict[str, float]:
        """Return numbers of a client, of which the round sums the weighted values among its scalars."""
        return {}

    def update_factor(self, measures: dict[str, float]) -> float:
        """Return what a client's update is multiplied by, besides its weight."""
        return 1.0

    def finish_client(self, client: FedAvgClient, update: Tensor, share: float, result: ClientResult) -> None:
        """Set the client's vectors to those that it keeps, and add to the round's sums.

        Args:
            client: the client that has trained.
            update: (start - local) * share, in place until the client's `finish` returns: do not change it.
            share: what the update was multiplied by.
            result: what the client did.
        """

    def mean_factor(self, sums: dict[str, float]) -> float:
        """Return what the mean of all updates is multiplied by."""
        return 1.0

    def correct(self, block: slice, update: Tensor, sums: dict[str, float]) -> None:
        """Edit the mean update of a block in place, on the ranks that move it."""


def inexact_updates(name: str, algorithm: FedAvg) -> list[str]:
    """Return the error of a limit to the norm of updates, which this correction needs as they are."""
    return _require(algorithm, "max_update_norm", None, f"with algorithm={name}: it needs updates as they are")


def proximal_term(name: str, algorithm: FedAvg) -> list[str]:
    """Return the error of FedProx's term beside those of this correction."""
    return _require(algorithm, "proximal_mu", 0, f"with algorithm={name}, which has terms of its own", "fedprox")


def unequal_weights(name: str, algorithm: FedAvg) -> list[str]:
    """Return the error of weights, where all clients weigh the same."""
    return _require(algorithm, "weighting", "equal", f"with algorithm={name}, where all clients weigh the same")


def kept_state(name: str, algorithm: FedAvg) -> list[str]:
    """Return the error of clients that keep optimizer state, while their displacement is measured without."""
    reason = f"with algorithm={name}: the displacement is measured with an optimizer without state"
    return _require(algorithm, "client_optimizer_state", "reset", reason)


def _require(algorithm: FedAvg, option: str, valid: Any, reason: str, other: str = "fedavg") -> list[str]:
    """Return an error unless an option of the algorithm has the only valid value; `other` is an algorithm without."""
    given = getattr(algorithm, option)
    if given == valid:
        return []
    way_out = f"set algorithm.{option}={format_value(valid)}, or algorithm={other}"
    return [f"algorithm.{option}={given} {reason}.\n  {way_out}"]
