"""What an algorithm is: the round, seen from one silo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from trainer.algorithms.client_result import Work
from trainer.algorithms.round import Round
from trainer.distributed.transport import Wire
from trainer.models.flat import FlatModel, Moments
from trainer.optim import Clip

InnerState = Literal["reset", "keep"]
MakeOptimizer = Callable[..., torch.optim.Optimizer]
Figures = dict[str, float | int]


class Algorithm(Protocol):
    """Abstract: begins a round, collects this silo's contributions, and combines them with the other silos'.

    All ranks of a silo call it with equal values, so their copies stay bit-equal without a word between them.

    inner_state       whether a client's optimizer state is kept until it trains again, or reset
    batch_statistics  how BatchNorm's running means and variances are combined: `pooled`, or their `mean`
    pools_data        whether the clients' examples are trained as those of one client
    sums_deltas       whether what the silos send are deltas that are summed, and may therefore be packed
    votes             whether a client whose delta is not finite is left out of the round
    overlap_steps     of the next round, in which what is sent at the end of one may be under way
    stateful          whether clients have state of their own between rounds, and so a home silo
    parts             those of the shared vector that this rank moves, known after `setup`
    """

    inner_state: InnerState
    batch_statistics: Moments
    pools_data: bool
    sums_deltas: bool
    votes: bool
    overlap_steps: int

    @property
    def stateful(self) -> bool: ...

    @property
    def parts(self) -> Sequence[slice]: ...

    def is_shared(self, name: str) -> bool:
        """Whether the parameter or buffer of this name is combined between the silos."""
        ...

    def refuse(self, optimizer: MakeOptimizer, clip: Clip, clients: int) -> None:
        """Raises ValueError, with the reasons, when so many clients a round, trained like this, cannot be combined."""
        ...

    def setup(self, model: FlatModel, optimizer: MakeOptimizer, client_weights: Sequence[float], wire: Wire) -> None:
        """Takes the model, whose shared vector holds the global parameters; makes the algorithm's own state.

        `optimizer` makes the one that trains clients; `client_weights` are the n_k of all clients; `wire` is the way to
        the other silos.
        """
        ...

    def begin_round(self, round: Round) -> None:
        """Forgets the last round's contributions."""
        ...

    def begin_client(self, state: dict[str, Any], alone: bool = False) -> None:
        """Puts the global parameters into the model; `state` is the client's last `client_state`, or empty.

        `alone`: before the next combination no other client begins, and this one surely comes to it.
        """
        ...

    def receive(self, steps: int) -> None:
        """Takes in what was under way between the silos, if it is time: the client has done so many of its steps."""
        ...

    def correct(self) -> None:
        """Edits the gradients of a step, after the mean over the silo and before clipping."""
        ...

    def contribute(self, work: Work) -> float:
        """Adds the trained model of a client to this silo's sums; the norm of its delta.

        A client whose delta is not finite contributes nothing, and its norm says why.
        """
        ...

    def client_state(self) -> dict[str, Any]:
        """What the client that has just contributed keeps until it trains again, besides its optimizer's state."""
        ...

    def header(self) -> dict[str, float]:
        """This silo's scalars, summed over the silos before the vectors; `weight` must be among them."""
        ...

    def combine(self, sums: dict[str, float]) -> Figures:
        """Moves the global parameters by what all silos contributed, and the model with them; what is told of it.

        `sums` are the headers'. A collective; when nobody brought anything it sends nothing, and nothing moves.
        """
        ...

    def settle(self) -> None:
        """Takes in what is still under way between the silos, because the run ends. A collective."""
        ...

    def round_state(self) -> dict[str, Any]:
        """What there is besides `state_dict` in the middle of a round: the global parameters, this silo's sums."""
        ...

    def load_round_state(self, state: dict[str, Any]) -> None:
        """Puts a `round_state` back, instead of `begin_round`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's state that all ranks hold, besides the global parameters: a tree of tensors and numbers."""
        ...

    def slice_state(self) -> dict[str, Any]:
        """The state that only the ranks with this one's slice hold; its names are others than theirs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` and the `slice_state` of all slices back, as one tree.

        The model must hold the global parameters already.
        """
        ...
