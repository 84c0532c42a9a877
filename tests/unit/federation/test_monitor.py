"""The monitor of a coordinator, asked by urllib, and read by Prometheus' own parser."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from trainer.federation.messages import Limit, Message
from trainer.federation.monitor import Meter, Monitor
from trainer.federation.registry import Registry
from trainer.federation.server import Traffic
from trainer.federation.spool import Spool


class Counts:
    """The bytes of a server."""

    def __init__(self):
        self.received, self.sent = Traffic(), Traffic()


class Gatherings:
    """The meetings of a coordinator, at which everything takes its time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def gather(self, key: str, *_: Any) -> dict[str, Message] | None:
        time.sleep(self.seconds)
        return {"berlin": Message({}), "rome": Message({})}

    def publish(self, key: str, result: Message) -> None:
        time.sleep(self.seconds / 2)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Spool(tmp_path / "meetings"), ["berlin", "paris", "rome"])


@contextmanager
def watched(registry: Registry, counts: Counts, seconds: float = 0.0, version: int = 0) -> Iterator[tuple[Meter, str]]:
    """Yield a meter, and the address at which it is seen."""
    meter = Meter(Gatherings(seconds), registry, counts, version)  # pyright: ignore[reportArgumentType]
    with Monitor("127.0.0.1:0", meter) as monitor:
        yield meter, f"http://127.0.0.1:{monitor.port}"


def metrics(address: str) -> dict[tuple[str, str], float]:
    """Return what Prometheus reads: values by name and member."""
    with urlopen(f"{address}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, sample.labels.get("member", "")): sample.value
            for family in families
            for sample in family.samples
        }


def test_health_and_presence_follow_the_members(registry: Registry) -> None:
    with watched(registry, Counts(), version=4) as (_, address):
        registry.enter("berlin", "a")
        with urlopen(f"{address}/healthz", timeout=10) as answer:
            assert answer.status == 200 and answer.headers["Content-Type"] == "application/json"
            assert json.load(answer) == {"version": 4, "present": ["berlin"], "members": ["berlin", "paris", "rome"]}
        registry.enter("rome", "b")
        registry.leave("berlin", "a")
        seen = metrics(address)
        assert {name: seen["silotrain_member_present", name] for name in registry.members} == {
            "berlin": 0.0,
            "paris": 0.0,
            "rome": 1.0,
        }
        assert seen["silotrain_version", ""] == 4


def test_rounds_are_measured_from_version_to_version(registry: Registry) -> None:
    with watched(registry, Counts(), seconds=0.05, version=7) as (meter, address):
        for index in (7, 8):
            for end in ("training", "evaluation"):
                assert meter.gather(f"rounds/{index}/{end}", Limit(), None)
                meter.publish(f"rounds/{index}/{end}", Message({}))
        seen = metrics(address)
    assert seen["silotrain_version", ""] == 9 and seen["silotrain_members_counted", ""] == 2
    assert seen["silotrain_round_seconds_count", ""] == seen["silotrain_wait_seconds_count", ""] == 2
    # Waited: training, then evaluation and training. The publications between them are no waits.
    assert 0.15 <= seen["silotrain_wait_seconds_sum", ""] < seen["silotrain_round_seconds_sum", ""] - 0.06


def test_bytes_by_member_and_open_meetings(registry: Registry) -> None:
    counts = Counts()
    with watched(registry, counts) as (_, address):
        list(counts.received.passing("paris", iter([b"x" * 1000, b"y" * 24])))
        list(counts.sent.passing("paris", iter([b"z"])))
        list(counts.sent.passing("stranger", iter([b"z"])))
        before = metrics(address)
        with pytest.raises(InterruptedError):
            registry.gather("rounds/0/training", Limit(), is_stopping=_interrupt)
        during = metrics(address)
        registry.publish("rounds/0/training", Message({}, {"total": torch.ones(2)}))
        after = metrics(address)
    assert before["silotrain_received_bytes_total", "paris"] == 1024
    assert before["silotrain_sent_bytes_total", "paris"] == 1
    assert before["silotrain_received_bytes_total", "rome"] == 0
    assert not [key for key in before if key[1] == "stranger"]
    assert [each["silotrain_meetings_open", ""] for each in (before, during, after)] == [0, 1, 0]


def _interrupt() -> bool:
    raise InterruptedError


@pytest.mark.parametrize("path", ["/", "/metrics/", "/metrics?x=1", "/../healthz", "/debug"])
def test_there_is_no_other_path(registry: Registry, path: str) -> None:
    with watched(registry, Counts()) as (_, address), pytest.raises(HTTPError) as refused:
        urlopen(f"{address}{path}", timeout=10)
    assert refused.value.code == 404
    refused.value.close()


def test_a_client_that_is_silent_or_talks_nonsense_keeps_nobody_waiting(registry: Registry) -> None:
    with watched(registry, Counts()) as (_, address):
        place = ("127.0.0.1", int(address.rpartition(":")[2]))
        with socket.create_connection(place), socket.create_connection(place) as nonsense:
            nonsense.sendall(b"\x16\x03\x01" + b"x" * 100 + b"\r\n\r\n")
            assert metrics(address)["silotrain_version", ""] == 0
        assert metrics(address)["silotrain_version", ""] == 0


def test_an_address_that_cannot_be_had_is_named(registry: Registry) -> None:
    meter = Meter(Gatherings(0), registry, Counts(), 0)  # pyright: ignore[reportArgumentType]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"site.monitor=127.0.0.1:{port} cannot be had: .*\n  valid: an address"):
            Monitor(f"127.0.0.1:{port}", meter)
