"""What an algorithm is: the round, seen from one silo."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

from trainer.cohort import Round
from trainer.flat import FlatModel

InnerState = Literal["reset", "keep"]


class Algorithm(Protocol):
    """Abstract: begins a round, collects this silo's contributions, and applies the total.

    All ranks of a silo call it with equal values, so their copies stay bit-equal without a word between them.

    inner_state  whether a client's optimizer state is kept until it trains again, or reset
    pools_data   whether the clients' examples are trained as those of one client
    votes        whether a client whose delta is not finite is left out of the round
    stateful     whether clients have state of their own between rounds, and so a home silo
    """

    inner_state: InnerState
    pools_data: bool
    votes: bool

    @property
    def stateful(self) -> bool: ...

    def is_shared(self, name: str) -> bool:
        """Whether the parameter or buffer of this name is combined between the silos."""
        ...

    def setup(self, model: FlatModel) -> None:
        """Takes the model, whose shared vector holds the global parameters; makes the algorithm's own state."""
        ...

    def begin_round(self, round: Round) -> None:
        """Forgets the last round's contributions."""
        ...

    def begin_client(self, client: int) -> None:
        """Puts the global parameters into the model."""
        ...

    def correct(self) -> None:
        """Edits the gradients of a step, after the mean over the silo and before clipping."""
        ...

    def contribute(self, client: int, examples: int) -> float:
        """Adds the trained model of a client to this silo's sums; the norm of its delta.

        A client whose delta is not finite contributes nothing, and its norm says why.
        """
        ...

    def header(self) -> dict[str, float]:
        """This silo's scalars, summed over the silos before the vectors; `weight` must be among them."""
        ...

    def payload(self, weight: float) -> Tensor:
        """This silo's vector for the wire, already divided by the total weight of all silos."""
        ...

    def apply(self, total: Tensor) -> None:
        """Moves the global parameters by the payloads' total, and the model with them."""
        ...

    def skip(self) -> None:
        """Ends a round to which nobody brought anything: the global parameters stay, and the model gets them back."""
        ...

    def round_state(self) -> dict[str, Any]:
        """What there is besides `state_dict` in the middle of a round: the global parameters, this silo's sums."""
        ...

    def load_round_state(self, state: dict[str, Any]) -> None:
        """Puts a `round_state` back, instead of `begin_round`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All of the algorithm's state that the global parameters do not hold, as a tree of tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` back. The model must hold the global parameters already."""
        ...
