"""Whom the coordinator answers, and what it takes: each stranger and each wrong message is refused, with a sentence."""

from __future__ import annotations

import datetime
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.support.coordinator import (
    DELTA,
    HONEST,
    INFO,
    KEY,
    LIMIT,
    MEMBERS,
    Federation,
    answer,
    coordinating,
    credentials,
    joined_by_force,
    parts_of,
)
from trainer.federation import certificates
from trainer.federation.certificates import certify, load_credentials
from trainer.federation.link import FETCH, JOIN, MEET, Link, LinkLostError, LinkRefusedError
from trainer.federation.messages import MAX_HEADER_BYTES, Limit, Message
from trainer.federation.server import MAX_STREAMS


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a federation, beside `other`, of another authority, `old` and `early`, of another time."""
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", *MEMBERS, "rome"])
    certify(folder.with_name("other"), ["coordinator", "berlin"])
    now, days = datetime.datetime.now, {"old": -40, "early": 10}
    for name, shift in days.items():

        class Then(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None, shift: int = shift) -> datetime.datetime:
                return now(tz) + datetime.timedelta(days=shift)

        shutil.copytree(folder, folder.with_name(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(certificates, "datetime", Then)
            certify(folder.with_name(name), ["berlin", "coordinator"], days=30, renew=True)
    return folder


@pytest.fixture(scope="module")
def quiet(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Yield a coordinator that waits for its members."""
    with coordinating(certs, tmp_path_factory.mktemp("quiet")) as federation:
        yield federation


@pytest.fixture(scope="module")
def busy(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Yield a coordinator that waits for the messages of a meeting; at the end it has those of both members."""
    with coordinating(certs, tmp_path_factory.mktemp("busy")) as federation:
        brought: list[Any] = []
        registry = federation.coordinator.registry
        waiting = threading.Thread(target=lambda: brought.append(registry.gather(KEY, LIMIT)))
        waiting.start()
        yield federation
        assert waiting.is_alive()
        with ExitStack() as stack:
            channels = [stack.enter_context(joined_by_force(federation, name)) for name in MEMBERS]
            calls = [channel.stream_stream(MEET)(iter(parts_of(HONEST))) for channel in channels]
            waiting.join(20)
            assert calls
        (messages,) = brought
        assert all(torch.equal(message.tensors["vector/delta"], DELTA) for message in messages.values())


IDENTITIES: dict[str, Callable[[Federation], grpc.Channel]] = {
    "plain text": lambda federation: grpc.insecure_channel(federation.address),
    "no certificate": lambda federation: grpc.secure_channel(
        federation.address,
        grpc.ssl_channel_credentials((federation.certs / "ca.pem").read_bytes()),
        [("grpc.ssl_target_name_override", "coordinator")],
    ),
    "another authority": lambda federation: federation.channel(
        replace(
            credentials(federation.certs.with_name("other"), "berlin"),
            authority=(federation.certs / "ca.pem").read_bytes(),
        )
    ),
    "expired": lambda federation: federation.channel(credentials(federation.certs.with_name("old"), "berlin")),
    "not yet valid": lambda federation: federation.channel(credentials(federation.certs.with_name("early"), "berlin")),
    "another key": lambda federation: federation.channel(
        replace(credentials(federation.certs, "berlin"), key=(federation.certs / "paris.key").read_bytes())
    ),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_strangers_reach_no_handler(quiet: Federation, identity: str) -> None:
    quiet.checked.clear()
    with IDENTITIES[identity](quiet) as channel:
        status, _ = answer(channel, JOIN, Message(quiet.joining(session="1")).parts())
    assert status == grpc.StatusCode.UNAVAILABLE
    assert not quiet.checked
    assert quiet.is_untouched()


@pytest.mark.parametrize("name", ["rome", "coordinator"])
@pytest.mark.parametrize("method", [JOIN, MEET, FETCH])
def test_those_who_are_no_members_are_refused_by_the_first_line(quiet: Federation, name: str, method: str) -> None:
    quiet.checked.clear()
    never = threading.Event()
    with quiet.channel(credentials(quiet.certs, name)) as channel:
        status, reason = answer(channel, method, iter(never.wait, True))  # nothing of it is read
    never.set()
    assert (status, reason) == (grpc.StatusCode.FAILED_PRECONDITION, f"{name} is no member\n  valid: berlin, paris")
    assert quiet.checked == [name]
    assert quiet.is_untouched()


def test_a_member_has_the_name_of_its_certificate_alone(certs: Path, tmp_path: Path) -> None:
    for end in ("pem", "key"):
        shutil.copy(certs / f"berlin.{end}", tmp_path / f"paris.{end}")
    shutil.copy(certs / "ca.pem", tmp_path)
    with pytest.raises(ValueError, match=r"paris\.pem is the certificate of berlin, not of paris"):
        load_credentials(tmp_path, "paris")


SETTINGS = {"model": "model._target_", "algorithm": "algorithm._target_", "seed": "seed"}
SAID: dict[str, tuple[dict[str, Any], str]] = {
    "no settings": ({"settings": {}}, "=null, but the coordinator has"),
    "settings that are a list": ({"settings": []}, "the header's settings: "),
    "another key": ({"trust": "me"}, "the header's trust: Unexpected keyword argument"),
    "no info": ({"info": {}}, "the header's info.train: "),
    "examples below 0": ({"info": {**INFO, "train": -1}}, "the header's info.train: "),
    "a truth for a number": ({"info": {**INFO, "test": True}}, "the header's info.test: Input should be a valid int"),
    "half an example": ({"info": {**INFO, "test": 1.5}}, "the header's info.test: "),
    "names that are none": ({"info": {**INFO, "label_names": [1]}}, "the header's info.label_names.0: "),
    "figures that are none": ({"withheld": ["all"]}, "the header's withheld.0: "),
    "no session": ({"session": None}, "the header's session: "),
    "a long session": ({"session": "x" * 65}, "the header's session: "),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_choices_are_refused_by_name_and_value(quiet: Federation, name: str) -> None:
    key = SETTINGS[name]
    link = Link(quiet.address, load_credentials(quiet.certs, "berlin"), 10.0)
    settings = {**quiet.coordinator.settings, key: "mine"}
    reason = rf"^{key}=mine, but the coordinator has \S+\n  set the same on both sides$"
    with pytest.raises(LinkRefusedError, match=reason), link.joined(quiet.joining(settings=settings)):
        pass
    assert quiet.is_untouched()


@pytest.mark.parametrize("name", SAID)
def test_what_a_site_says_of_itself_is_checked(quiet: Federation, name: str) -> None:
    said, reason = SAID[name]
    with quiet.channel(credentials(quiet.certs, "berlin")) as channel:
        status, found = answer(channel, JOIN, Message(quiet.joining(**{"session": "1", **said})).parts())
    assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert reason in found
    assert quiet.is_untouched()


def test_a_second_launch_and_other_examples_under_one_name_are_refused(certs: Path, tmp_path: Path) -> None:
    with coordinating(certs, tmp_path) as federation, federation.channel(credentials(certs, "berlin")) as channel:
        first = channel.stream_stream(JOIN)(Message(federation.joining(session="1")).parts())
        first.initial_metadata()
        status, reason = answer(channel, JOIN, Message(federation.joining(session="2")).parts())
        assert status == grpc.StatusCode.FAILED_PRECONDITION
        assert reason.startswith("berlin is here already, by another launch\n  ")
        first.cancel()
        other = federation.joining(session="2", info={**INFO, "train": 8})
        status, reason = answer(channel, JOIN, Message(other).parts())
        assert reason == "the examples of berlin are not those with which it has joined before"


def reworded(change: Callable[[str], str]) -> list[bytes]:
    """Return the honest message with another text as its first part."""
    first, *rest = parts_of(HONEST)
    text = change(first[8:].decode()).encode()
    return [len(text).to_bytes(8, "little") + text, *rest]


def tensors(**named: torch.Tensor) -> list[bytes]:
    named = {name.replace("_", "/"): tensor for name, tensor in named.items()}
    return parts_of(Message(HONEST.header, {**HONEST.tensors, **named}))


TWICE = '"vector/delta": {"dtype": "F32", "shape": [5], "data_offsets": [12, 32]}'
WRONG: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "the first part is no header"),
    "a pickle": ([pickle.dumps(print)], "the first part is no header"),
    "no JSON": (reworded(lambda text: text[1:]), "the first part is no JSON"),
    "another protocol": (
        reworded(lambda text: text.replace('"protocol": "1"', '"protocol": "2"')),
        "protocol 2; this side speaks 1\n  install the same version of silotrain on both sides",
    ),
    "a long header": (parts_of(HONEST, key="a" * MAX_HEADER_BYTES), "at most 1,048,576 are valid"),
    "a key that is a path": (parts_of(HONEST, key="../../berlin"), "the header's key: String should match"),
    "a long key": (parts_of(HONEST, key="a" * 201), "the header's key: String should have at most"),
    "an unknown entry": (parts_of(HONEST, code="print()"), "the header's code: Unexpected keyword argument"),
    "a truth for a number": (parts_of(HONEST, sums={"weight": True}), "the header's sums.weight: Input should be"),
    "a text for a number": (parts_of(HONEST, sums={"weight": "2"}), "the header's sums.weight: Input should be"),
    "rounds below 0": (parts_of(HONEST, saved=-1), "the header's saved: Input should be greater"),
    "another scalar": (parts_of(HONEST, sums={"weight": 1, "x": 1}), "the message has unexpected scalars: x"),
    "a scalar less": (parts_of(HONEST, sums={}), "the message misses scalars: weight"),
    "too large a tensor": (tensors(vector_delta=torch.zeros(10**6)), "tensors of 4,000,012 bytes; at most 32 are"),
    "another shape": (tensors(vector_delta=torch.zeros(4)), "vector/delta of float32 [4]; float32 [5] is expected"),
    "another dtype": (
        tensors(vector_delta=torch.zeros(5, dtype=torch.int32)),
        "vector/delta of int32 [5]; float32 [5] is expected",
    ),
    "another tensor": (
        parts_of(Message(HONEST.header, {"table/counts": torch.zeros(3), "vector/sigma": DELTA})),
        "the message misses tensors: vector/delta",
    ),
    "a tensor less": (parts_of(Message(HONEST.header, {"vector/delta": DELTA})), "misses tensors: table/counts"),
    "a tensor twice": (
        reworded(lambda text: text.rstrip().removesuffix("}") + f", {TWICE}}}"),
        "the first part has a name twice",
    ),
    "a part less": (parts_of(HONEST)[:1], "the message ended early: 32 bytes are missing"),
    "a part more": ([*parts_of(HONEST), b"x"], "a part of 1 bytes, and 0 are missing"),
    "the parts in another order": (parts_of(HONEST)[::-1], "the first part is no header"),
    "an empty part": ([parts_of(HONEST)[0], b""], "a part of 0 bytes, and 32 are missing"),
}


@pytest.fixture(scope="module")
def berlin(busy: Federation) -> Iterator[grpc.Channel]:
    with joined_by_force(busy, "berlin") as channel:
        yield channel


@pytest.mark.parametrize("name", WRONG)
def test_wrong_messages_are_refused_and_leave_nothing(busy: Federation, berlin: grpc.Channel, name: str) -> None:
    parts, reason = WRONG[name]
    status, found = answer(berlin, MEET, parts)
    assert status == grpc.StatusCode.INVALID_ARGUMENT, found
    assert reason in found
    assert not busy.coordinator.registry.meetings[KEY].brought
    spool = busy.coordinator.registry.spool.folder
    assert not [path for path in spool.rglob("*") if "berlin" in path.name]


def test_a_session_that_has_ended_or_not_begun_is_told_to_join(busy: Federation, berlin: grpc.Channel) -> None:
    assert answer(berlin, MEET, parts_of(HONEST, session="0")) == (
        grpc.StatusCode.UNAVAILABLE,
        "berlin has not joined",
    )
    with busy.channel(credentials(busy.certs, "paris")) as paris:  # a session of another
        assert answer(paris, MEET, parts_of(HONEST)) == (grpc.StatusCode.UNAVAILABLE, "paris has not joined")
        assert answer(paris, FETCH, Message({"session": "1", "rounds": 0}).parts())[1] == "paris has not joined"


@pytest.mark.parametrize("rounds", [None, -1, 0.5, True, "1", 10**400])
def test_questions_are_checked(berlin: grpc.Channel, rounds: Any) -> None:
    status, reason = answer(berlin, FETCH, Message({"session": "1", "rounds": rounds}).parts())
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert reason.startswith("the header's rounds: ")


POSERS = {
    "paris": "the certificate there is not the coordinator's",
    "other": "the certificate there is of another authority than ca.pem",
    "old": "the coordinator's certificate has expired",
    "early": "the coordinator's certificate is not valid yet",
}


@pytest.mark.parametrize("poser", POSERS)
def test_a_site_brings_nothing_to_one_who_is_no_coordinator(
    certs: Path, tmp_path: Path, poser: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = certs if poser == "paris" else certs.with_name(poser)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        of = credentials(folder, "paris" if poser == "paris" else "coordinator")
        patch.setattr("trainer.federation.membership.load_credentials", lambda *_: of)
        federation = stack.enter_context(coordinating(certs, tmp_path))
        link = Link(federation.address, load_credentials(certs, "berlin"), 0.3)
        reason = f"{federation.address} cannot be reached: {POSERS[poser]}"
        with pytest.raises(LinkLostError, match=reason), link.joined(federation.joining()):
            pass
        assert not federation.checked
    assert capfd.readouterr().err.count(f"{reason}") == 1


@pytest.mark.parametrize("folder", ["other", "old", "early"])
def test_a_site_that_is_not_taken_is_told_why_that_may_be(quiet: Federation, folder: str) -> None:
    authority = credentials(quiet.certs, "rome").authority
    link = Link(quiet.address, replace(credentials(quiet.certs.with_name(folder), "berlin"), authority=authority), 0.3)
    with pytest.raises(LinkLostError, match="may not take this site's certificate"), link.joined(quiet.joining()):
        pass
    assert quiet.is_untouched()


def test_a_result_of_another_kind_is_refused_by_the_site(certs: Path, tmp_path: Path) -> None:
    with coordinating(certs, tmp_path) as federation, ExitStack() as stack:
        federation.coordinator.registry.publish(KEY, Message({}, {"vector/parameters": torch.zeros(10**6)}))
        channel = stack.enter_context(joined_by_force(federation, "paris"))
        assert channel
        link = stack.enter_context(federation.joined("berlin"))
        for limit, reason in (
            (Limit(100), "tensors of 4,000,000 bytes; at most 100 are expected"),
            (Limit.like((), {"vector/parameters": torch.zeros(10**6 + 1)}), r"float32 \[1000001\] is expected"),
        ):
            with pytest.raises(LinkRefusedError, match=f"something else than is expected: .*{reason}"):
                link.meet(Message({"key": KEY}), limit)


def test_many_streams_and_connections_of_one_leave_the_others_served(certs: Path, tmp_path: Path) -> None:
    with coordinating(certs, tmp_path) as federation, ExitStack() as stack:
        berlin = [stack.enter_context(federation.channel(credentials(certs, "berlin"))) for _ in range(4)]
        never = threading.Event()
        stack.callback(never.set)
        calls = [channel.stream_stream(MEET)(iter(never.wait, True)) for channel in berlin for _ in range(25)]
        stack.callback(lambda: [call.cancel() for call in calls])
        half_open = [socket.create_connection(("127.0.0.1", federation.coordinator.server.port)) for _ in range(100)]
        for number, connection in enumerate(half_open):
            stack.callback(connection.close)
            if number % 2:
                connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a handshake
        deadline = time.monotonic() + 20
        while federation.checked.count("berlin") < MAX_STREAMS and time.monotonic() < deadline:
            time.sleep(0.02)
        began = time.monotonic()
        with federation.channel(credentials(certs, "paris")) as paris:
            presence = paris.stream_stream(JOIN)(Message(federation.joining(session="1")).parts(), timeout=20)
            presence.initial_metadata()
            assert federation.coordinator.registry.present() == ["paris"]
            presence.cancel()
        assert time.monotonic() - began < 5
        assert federation.coordinator.server.streams["berlin"] == MAX_STREAMS
