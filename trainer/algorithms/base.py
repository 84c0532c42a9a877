"""The protocols of an algorithm, by lifetime: an Algorithm, its run, a round of it, a client of the round.

    Algorithm      a choice: frozen, and the same value may serve any number of runs
    RunSession     the algorithm at work on one model
    RoundSession   one round, as seen from one silo: its clients, and what they sum up to
    ClientSession  one client's local training in that round

Each makes the next, so a wrong order of calls cannot be written. All ranks of a silo make the same calls with equal
values, so their copies stay bit-equal without communication. Where most algorithms do nothing, so do the methods here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from trainer.algorithms.client_result import ClientResult
from trainer.algorithms.round import Round
from trainer.distributed.transport import Transport
from trainer.models.buffers import BatchNormReduction
from trainer.models.flat import FlatModel
from trainer.optim import GradientClipper
from trainer.optim.optimizers import OptimizerFactory

T = TypeVar("T")

ClientOptimizerState = Literal["reset", "keep"]
Metrics = dict[str, float | int]
ClientState = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The choices of a run that an algorithm may be unable to work with.

    Attributes:
        optimizer: makes the optimizer of the clients.
        clip: limits to a step's gradient.
        silos: number of silos.
        clients_per_round: number of clients that a round combines.
        sampling: the name of what draws the clients of a round; None if all take part.
        drops_stragglers: whether clients that are late are left out.
        finetuning_steps: steps after which personalised models are evaluated; 0 for none.
        compression: the name of what compresses updates between silos; None if nothing does.
        moves_momentum: whether the schedule changes the momentum of the clients' optimizer.
    """

    optimizer: OptimizerFactory
    clip: GradientClipper
    silos: int
    clients_per_round: int
    sampling: str | None = None
    drops_stragglers: bool = False
    finetuning_steps: int = 0
    compression: str | None = None
    moves_momentum: bool = False


class Algorithm(Protocol):
    """A choice of how clients train and how silos combine what they have learnt. A frozen value.

    Attributes:
        client_optimizer_state: whether a client's optimizer state is kept until it trains again, or reset.
        batchnorm_stats: how running means and variances are combined: `pooled` as those of all examples, or their
            plain `mean`.
        keeps_client_state: whether clients keep anything between rounds, and so have a home silo.
        moves_global_model: whether each local step moves the global model, as in data parallelism.
        skips_nonfinite_clients: whether a client whose update is not finite is left out of the round.
        overlap_steps: steps of the next round during which communication may still be under way.
        adds_to_gradients: whether clients' sessions add terms to the gradients of their steps.
        needs_one_world: whether silos exchange at other times than once at the end of a round, as sites do.
    """

    client_optimizer_state: ClientOptimizerState
    batchnorm_stats: BatchNormReduction
    moves_global_model: bool = False
    skips_nonfinite_clients: bool = False
    overlap_steps: int = 0
    needs_one_world: bool = False

    @property
    def adds_to_gradients(self) -> bool:
        return False

    @property
    def keeps_client_state(self) -> bool: ...

    def is_shared(self, name: str) -> bool:
        """Return whether the parameter or buffer of this name is combined between the silos."""
        return True

    def merge_clients(self, values: Sequence[T], merge: Callable[[Sequence[T]], T]) -> Sequence[T]:
        """Return values by client; a single merged one if all clients' examples are trained as those of one client."""
        return values

    def validate(self, setting: Setting) -> None:
        """Raise ValueError, with all the reasons, if the algorithm cannot work with these choices."""
        ...

    def setup(
        self, model: FlatModel, optimizer: OptimizerFactory, client_weights: Sequence[float], transport: Transport
    ) -> RunSession:
        """Return the algorithm at work on a model, whose shared vector holds the initial global parameters.

        Args:
            model: is trained in place; its shared vector is where clients train.
            optimizer: makes the optimizer of the clients.
            client_weights: n_k of every client: its number of examples, or the sum of their weights.
            transport: sums vectors over the silos.
        """
        ...


class RunSession(Protocol):
    """An algorithm at work on one model: the global parameters, and what moves them.

    Attributes:
        parts: the parts of the shared vector that this rank sums and moves.
    """

    parts: Sequence[slice] = ()

    def start_round(self, round: Round) -> RoundSession:
        """Begin a round. Its clients begin at the global parameters of now."""
        ...

    def load_round(self, round: Round, state: dict[str, Any]) -> RoundSession:
        """Restore a round from its `state_dict`, in place of `start_round`."""
        ...

    def reset_model(self) -> None:
        """Copy the global parameters into the model."""

    def flush(self) -> None:
        """Wait for, and apply, communication that is still under way, because the run ends. A collective."""

    def global_state(self) -> dict[str, Tensor]:
        """Return the live vectors that clients begin a round with; `parameters` is among them."""
        ...

    def load_global_state(self, state: dict[str, Tensor]) -> None:
        """Copy a `global_state` into place, and into the model."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all ranks hold alike, but for what the model holds: a tree of tensors and numbers."""
        return {}

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's `parts`, under names that no other rank with other parts uses."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` and the `sharded_state_dict` of all parts, as one tree.

        The model must hold the global parameters already.
        """


class RoundSession(Protocol):
    """One round of an algorithm, as seen from one silo.

    Attributes:
        planned_weight: the weight of all clients of the round, whichever silo trains them; 0 if there is one silo.
    """

    planned_weight: float = 0.0

    def start_client(self, state: ClientState, exclusive: bool = False) -> ClientSession:
        """Copy the parameters that a client begins with into the model.

        Args:
            state: the client's last `client_state`; empty before its first round.
            exclusive: no other client of this silo begins before `aggregate`, and this one surely finishes.
        """
        ...

    def load_client(self, state: dict[str, Any]) -> ClientSession:
        """Restore a client from its `state_dict`, in place of `start_client`. The model must be restored already."""
        ...

    def scalars(self) -> dict[str, float]:
        """Return this silo's sums of scalars, which go between the silos before the vectors; `weight` is among them."""
        ...

    def aggregate(self, sums: dict[str, float]) -> Metrics:
        """Move the global parameters, and the model with them, by what all silos have summed. A collective.

        Args:
            sums: the `scalars` of all silos, summed. With a weight of 0 nothing is sent, and nothing moves.

        Returns:
            Metrics of the combination.
        """
        ...

    def contribution(self) -> dict[str, Tensor]:
        """Return the vectors that this silo's clients have summed, as shares of the weight planned for its round.

        They may lie in the model's memory. There are none if no client has finished.
        """
        ...

    def contribution_like(self, clients: int) -> dict[str, Tensor]:
        """Return vectors of the names, dtypes and shapes of a `contribution`, whose numbers mean nothing.

        Args:
            clients: of the silo that have finished.
        """
        ...

    def merge(self, contribution: dict[str, Tensor], weight: float, factor: float = 1.0) -> None:
        """Add the contribution of another silo, as if its clients had trained here.

        Args:
            contribution: what `contribution` returned there.
            weight: the weight that was planned for its round.
            factor: multiplies it, such as for staleness.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the middle of a round besides the run's: the global parameters, this silo's sums."""
        ...


class ClientSession(Protocol):
    """One client's local training."""

    def before_step(self, step: int) -> None:
        """Apply what has come in from the other silos, if it is due before this step, counted from 0."""

    def adjust_gradients(self) -> None:
        """Edit the gradients of a step in place, after the mean over the silo and before clipping."""

    def finish(self, result: ClientResult) -> tuple[float, ClientState]:
        """Add the trained model's update to the sums of the silo.

        Returns:
            The norm of the update, not finite if the client is left out; and the state that the client keeps until it
            trains again, besides that of its optimizer.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the middle of the client's round."""
        ...
