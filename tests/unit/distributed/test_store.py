"""The signed store: values of others count as not written; and how ranks open it."""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.distributed import store as module
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.store import SignedStore, open_store

TOKEN, OTHER = b"a token of this launch", b"a token of another one"


@settings(max_examples=20)
@given(st.text(), st.sampled_from(["leave", "config", "beat/3"]))
def test_a_value_is_read_as_it_was_written(value: str, key: str) -> None:
    store = SignedStore(HashStore(), TOKEN)
    assert store.read(key) is None
    store.set(key, value)
    assert store.read(key) == store.get(key) == value


def test_a_value_without_the_signature_is_not_there_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nor is one that was signed for another key, or under another prefix."""
    raw = HashStore()
    store, stranger = SignedStore(raw, TOKEN), SignedStore(raw, OTHER)
    store.set("good", "leave")
    with caplog.at_level(logging.WARNING, "trainer"):
        for forged in ("", "leave", raw.get("good").decode(), f"{'0' * 64} leave"):
            raw.set("key", forged)
            assert store.read("key") is None
        stranger.set("key", "leave")
        assert store.read("key") is None
    assert caplog.messages == ["refused: whoever wrote key to the store of this run does not hold its token"]
    store.below("first").set("leave", "")
    raw.set("second/leave", raw.get("first/leave").decode())
    assert store.below("second").read("leave") is None and store.below("first").read("leave") == ""


def test_a_reader_waits_until_one_who_holds_the_token_has_written() -> None:
    raw = HashStore()
    raw.set("key", "forged")

    def write() -> None:
        time.sleep(0.2)
        SignedStore(raw, TOKEN).set("key", "right")

    Thread(target=write).start()
    assert SignedStore(raw, TOKEN).get("key") == "right"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def open_ranks(ranks: list[int], port: int, size: int = 2, token: bytes = TOKEN) -> list[SignedStore]:
    """Open the store as these ranks of one machine, together."""

    def open_one(rank: int) -> SignedStore:
        return open_store(ClusterEnvironment(rank, size, rank, size, 0, "127.0.0.1", port, "srun"), token)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(open_one, ranks))


def listening(port: int) -> set[str]:
    """Return the addresses, as the kernel writes them, at which something listens at this port."""
    with open("/proc/net/tcp") as four, open("/proc/net/tcp6") as six:
        rows = [line.split() for line in (*four, *six)]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}


def test_ranks_of_one_machine_share_a_store_that_listens_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    first, second = open_ranks([0, 1], port)
    first.set("key", "value")
    assert second.get("key") == "value"
    assert listening(port) == {"0100007F"}


def test_a_copied_start_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger has written a start that it has copied, with the answer to the rank of then."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    old = SignedStore(server, TOKEN)
    old.set("start", "old")
    old.set("old/1/drawn then", "")
    stores = open_ranks([0, 1], server.port)
    stores[0].set("key", "value")
    assert stores[1].get("key") == "value"
    assert stores[0]._prefix == stores[1]._prefix != "old/"


def test_ranks_that_do_not_come_are_named_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell of `srun --ntasks=4 --pty` is task 0 of four, and the others are shells that have ended."""
    assert module.NOTICE_SECONDS <= 5
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(module, "JOIN_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(TimeoutError, match="waits for 3 of the 4 ranks: 1, 2, 3"):
        open_ranks([0], free_port(), size=4)
    printed = capsys.readouterr().err
    assert printed.count("rank 0 waits for 3 of the 4 ranks: 1, 2, 3") == 1
    assert "srun --overlap --ntasks=4 python -m trainer" in printed and "--ntasks=1" in printed
