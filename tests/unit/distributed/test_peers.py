"""Values that ranks exchange through a store, before their process groups are open."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.peers import Peers
from trainer.distributed.store import SignedStore


def on_ranks(size: int, work: Callable[[Peers], Any]) -> list[Any]:
    """Return what the work returns on each of these ranks, which share a store; or the text of its ValueError."""
    store = SignedStore(HashStore(), b"token")

    def answer(rank: int) -> Any:
        try:
            return work(Peers(ClusterEnvironment(rank, size), store))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(answer, range(size)))


def refuse(peers: Peers) -> int:
    """Return the rank; ranks 1 and 2 refuse for the same reason, rank 3 for another."""
    if peers.rank:
        raise ValueError("no disk" if peers.rank < 3 else "no memory")
    return peers.rank


@pytest.mark.parametrize("size", [1, 4])
def test_all_gather_returns_the_values_in_the_order_of_ranks(size: int) -> None:
    assert (
        on_ranks(size, lambda peers: peers.all_gather("x", lambda: peers.rank * 2))
        == [[rank * 2 for rank in range(size)]] * size
    )


def test_errors_are_raised_on_all_ranks_each_once() -> None:
    assert on_ranks(4, lambda peers: peers.all_gather("x", lambda: refuse(peers))) == ["no disk\nno memory"] * 4
    assert on_ranks(4, lambda peers: peers.on_all_ranks("x", lambda: refuse(peers))) == ["no disk\nno memory"] * 4


def test_a_broadcast_is_that_of_rank_0_alone() -> None:
    """The others do not make the value, and rank 0 does not wait for them."""
    assert on_ranks(4, lambda peers: peers.broadcast("x", lambda: {"rank": peers.rank})) == [{"rank": 0}] * 4
    assert (
        Peers(ClusterEnvironment(0, 2), SignedStore(HashStore(), b"token")).broadcast("x", lambda: "alone") == "alone"
    )

    def fail() -> None:
        raise ValueError("bad input")

    assert on_ranks(4, lambda peers: peers.broadcast("x", fail)) == ["bad input"] * 4
