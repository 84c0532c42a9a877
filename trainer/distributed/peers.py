"""Values that ranks exchange before their process groups are open."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.store import SignedStore
from trainer.utils.errors import distinct_errors, raise_errors

T = TypeVar("T")


class Peers:
    """This rank and the others, which exchange values through the store of rank 0.

    All of them must call the same methods, in the same order.
    """

    def __init__(self, environment: ClusterEnvironment, store: SignedStore):
        self.environment, self.store = environment, store
        self.rank = environment.rank

    def all_gather(self, name: str, make: Callable[[], Any]) -> list[Any]:
        """Return what `make` returns on each rank, as JSON keeps it, on all ranks.

        Raises:
            ValueError: `make` raised it on some ranks; has the errors of all.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(_answer(make)))
        if self.rank == 0:
            ranks = range(self.environment.world_size)
            self.store.set(name, json.dumps([json.loads(self.store.get(f"{name}/{rank}")) for rank in ranks]))
        return _values(json.loads(self.store.get(name)))

    def broadcast(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns on rank 0, as JSON keeps it, on all ranks; raise its ValueError on all."""
        if self.rank == 0:
            self.store.set(name, json.dumps([_answer(make)]))
        return _values(json.loads(self.store.get(name)))[0]

    def on_all_ranks(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returns on this rank; if it raises ValueError on some ranks, raise their errors on all."""
        made: list[T] = []
        self.all_gather(name, lambda: made.append(make()))
        return made[0]

    def leave(self) -> None:
        """Let rank 0, which holds the store, exit last."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            for rank in range(self.environment.world_size):
                self.store.get(f"left/{rank}")


def _answer(make: Callable[[], Any]) -> dict[str, Any]:
    """Return the value that `make` returns, or the text of its ValueError."""
    try:
        return {"value": make()}
    except ValueError as error:
        return {"error": str(error)}


def _values(answers: list[dict[str, Any]]) -> list[Any]:
    """Return the values of answers; raise a ValueError with their errors if there are any."""
    raise_errors(distinct_errors(answer["error"] for answer in answers if "error" in answer))
    return [answer["value"] for answer in answers]
