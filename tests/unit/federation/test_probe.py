"""A probe measures the link as it is, within its bounds, and is nobody's presence."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch

from tests.unit.federation.test_handshake import Nobody
from trainer import __version__
from trainer.federation import probe
from trainer.federation.certificates import certify, load_credentials
from trainer.federation.link import PROBE, Link
from trainer.federation.messages import Message
from trainer.federation.probe import LinkFacts, LinkProbe, Probes, probe_link
from trainer.federation.registry import RefusedError, Registry
from trainer.federation.server import Server
from trainer.federation.spool import Spool


class Clocks:
    """The clocks of both ends, which stand still but for the time that parts need on the way."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def on_the_way(self, parts: Iterator[bytes], bytes_per_second: float, delay: float) -> Iterator[bytes]:
        for part in parts:
            self.now += delay + len(part) / bytes_per_second
            yield part


class Recorder:
    """Passes parts on, and records their sizes."""

    def __init__(self, parts: Iterator[bytes]):
        self.parts, self.sizes = parts, []

    def __iter__(self) -> Recorder:
        return self

    def __next__(self) -> bytes:
        part = next(self.parts)
        self.sizes.append(len(part))
        return part


def probed(channel: grpc.Channel) -> LinkFacts:
    """Probe, once the coordinator has noticed that the member of the one before has hung up."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return probe_link(channel)
        except ValueError as error:
            if "another site measures" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", "berlin", "rome"])
    return folder


@contextmanager
def linked(certs: Path, name: str) -> Iterator[tuple[grpc.Channel, Server]]:
    """Yield the channel of a member to a coordinator whose only member is berlin."""
    registry = Registry(Spool(certs / "meetings"), ["berlin"])
    server = Server("127.0.0.1:0", load_credentials(certs, "coordinator"), registry, Nobody())
    link = Link(f"127.0.0.1:{server.port}", load_credentials(certs, name), 0.0)
    try:
        yield link.channel, server
    finally:
        link.channel.close()
        server.stop(0)


@pytest.mark.parametrize(("up", "down"), [(2e6, 5e5), (125e3, 125e3), (1.25e9, 1.25e9)])
def test_speed_latency_and_clock_of_a_link(up: float, down: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, link = Clocks(), LinkProbe()
    monkeypatch.setattr(probe, "time", clocks)
    facts = link.facts(
        clocks.on_the_way(Probes().answer(clocks.on_the_way(link.parts(), up, 0), lambda: None), down, 0)
    )
    assert (facts.up, facts.down) == pytest.approx((up, down))
    assert clocks.now < 1000 + 2 * (probe.FILL_SECONDS + 2)


def test_the_clock_of_the_coordinator_is_compared_in_the_middle_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, link = Clocks(), LinkProbe()
    monkeypatch.setattr(probe, "time", clocks)

    def answers() -> Iterator[bytes]:
        for part in Probes().answer(clocks.on_the_way(link.parts(), 1e6, 0.1), lambda: None):
            yield part.replace(b'time\\": 1', b'time\\": 7', 1)  # 6000 seconds ahead; JSON within JSON

    facts = link.facts(clocks.on_the_way(answers(), 1e6, 0.1))
    assert facts.clock_offset == pytest.approx(6000, abs=0.01)
    assert facts.latency == pytest.approx(0.2, abs=0.01)


def test_no_more_than_its_bound_is_taken_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_BYTES", 3 * probe.FILLER_BYTES)
    link = LinkProbe()
    sent = Recorder(link.parts())
    received = Recorder(Probes().answer(sent, lambda: None))
    link.facts(received)
    assert sum(sent.sizes) == 4 * probe.FILLER_BYTES  # the first part begins the measurement
    assert len(received.sizes) == probe.PINGS + 1 + 3


def test_another_protocol_is_named() -> None:
    (part,) = Message({}).parts()
    with pytest.raises(ValueError, match="protocol 7; this side speaks 1\n  install the same version"):
        LinkProbe().facts(iter([part.replace(b'"protocol": "1"', b'"protocol": "7"')]))


def test_one_at_a_time() -> None:
    probes, link = Probes(), LinkProbe()
    first = probes.answer(link.parts(), lambda: None)
    next(first)
    with pytest.raises(RefusedError, match="another site measures its link now\n  try again"):
        next(probes.answer(iter([b""]), lambda: None))
    first.close()
    assert next(probes.answer(iter([b""]), lambda: None))


def test_over_tls_it_joins_nobody_and_strangers_are_refused(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FILL_SECONDS", 0.1)
    with linked(certs, "berlin") as (channel, server):
        facts = probed(channel)
        assert server.registry.present() == []
        assert probed(channel).up > 1e5
    assert facts.down > 1e5 and 0 < facts.latency < 1 and abs(facts.clock_offset) < 0.5
    assert facts.versions == {"silotrain": __version__, "torch": str(torch.__version__)}
    with linked(certs, "rome") as (channel, _), pytest.raises(ValueError, match="rome is no member"):
        probe_link(channel)


def test_it_ends_after_its_time_whatever_the_member_does(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIMIT_SECONDS", 0.3)
    with linked(certs, "berlin") as (channel, _):
        began, ended = time.monotonic(), threading.Event()

        def parts() -> Iterator[bytes]:
            yield b""
            ended.wait(10)

        with pytest.raises(grpc.RpcError):
            list(channel.stream_stream(PROBE)(parts()))
        assert time.monotonic() - began < 5
        ended.set()
        monkeypatch.undo()
        monkeypatch.setattr(probe, "FILL_SECONDS", 0.02)
        assert probed(channel).up > 0
