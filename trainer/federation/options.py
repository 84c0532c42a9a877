"""Options of a federation. The configuration has the same keys, which conf/config.yaml documents. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from trainer.utils.annotations import OPTIONS, PositiveInt, Seconds, predicate

Figure = Literal["training", "evaluation", "labels", "statistics"]
FIGURES: tuple[Figure, ...] = get_args(Figure)

COORDINATOR = "coordinator"  # the name in its certificate, whatever host it is on

Names = Annotated[Sequence[str], Field(description="a list of names such as [berlin,paris]")]
Figures = Annotated[
    Sequence[Figure],
    Field(description=f"a list of some of {', '.join(FIGURES)}"),
    predicate(lambda figures: len({*figures}) == len(figures)),
]


@dataclass(frozen=True, config=OPTIONS)
class SiteOptions:
    """Who a launch is in a federation, and whom it meets.

    Attributes:
        name: of this site; None: it is none.
        server: host:port of the coordinator, for a site.
        listen: host:port of this launch, for the coordinator; None: it is none.
        members: the names of all sites, in the order of their clients, for the coordinator.
        certificates: the folder of the certificates.
        allow: the figures that may leave this site.
        min_members: how many sites a version needs; None: more than half of them.
        grace_seconds: how long a round waits for a site that has vanished; None: for ever.
        retry_seconds: how long a site tries to reach the coordinator.
        monitor: host:port at which the coordinator answers /healthz and /metrics; None: nowhere.
        simulate: how many sites this machine starts, or has started if this launch is one of them; None: none.
    """

    name: str | None
    server: str | None
    listen: str | None
    members: Names
    certificates: str | None
    allow: Figures
    min_members: PositiveInt | None
    grace_seconds: Seconds | None
    retry_seconds: Seconds
    monitor: str | None
    simulate: PositiveInt | None

    @property
    def quorum(self) -> int:
        """The number of sites without which the others do not go on."""
        return len(self.members) // 2 + 1 if self.min_members is None else self.min_members

    @property
    def is_simulation(self) -> bool:
        """Whether this launch starts a coordinator and sites, which are launches of their own."""
        return self.simulate is not None and self.name is None

    @property
    def is_federated(self) -> bool:
        """Whether this launch takes part in a federation."""
        return self.name is not None or self.listen is not None
