"""Links over real mutual TLS on loopback: what is brought comes back as a result, and strangers are refused."""

import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import grpc
import pytest
import torch

from trainer.federation.certificates import certify, load_credentials
from trainer.federation.link import MEET, Link, LinkLostError, LinkRefusedError
from trainer.federation.messages import Message
from trainer.federation.registry import RefusedError, Registry
from trainer.federation.server import Server

MEMBERS = ("berlin", "paris")


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", *MEMBERS, "rome"])
    return folder


class Welcome:
    """Admits members, and messages of a megabyte."""

    def admit(self, name, header):
        if header.get("model") != "cnn":
            raise RefusedError(f"model={header.get('model')}, but the coordinator has cnn")
        return {"name": name}

    def max_bytes(self, name):
        return 1 << 20


@contextmanager
def serving(certs, registry, port=0):
    server = Server(f"127.0.0.1:{port}", load_credentials(certs, "coordinator"), registry, Welcome())
    try:
        yield server.port
    finally:
        server.stop(0)


@contextmanager
def linked(certs, port, name, retry_seconds=10.0):
    link = Link(f"127.0.0.1:{port}", load_credentials(certs, name), retry_seconds)
    try:
        yield link
    finally:
        link.close()


def in_threads(*functions):
    results = [None] * len(functions)

    def call(place, function):
        results[place] = function()

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def add_up(registry, key):
    brought = registry.gather(key)
    total = sum(message.tensors["delta"] for message in brought.values())
    registry.publish(key, Message({"members": list(brought)}, {"total": total}))


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_sum_comes_back_to_both(certs):
    registry = Registry(MEMBERS)
    deltas = {name: torch.randn(70_000, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(MEMBERS)}
    with ExitStack() as stack:
        port = stack.enter_context(serving(certs, registry))
        links = {name: stack.enter_context(linked(certs, port, name)) for name in MEMBERS}
        for number in range(6):
            meets = [
                lambda name=name, key=str(number): links[name].meet(
                    Message({"key": key}, {"delta": deltas[name]}), 1 << 20
                )
                for name in reversed(MEMBERS)
            ]
            *answers, _ = in_threads(*meets, lambda key=str(number): add_up(registry, key))
            for answer in answers:
                assert answer.header == {"members": list(MEMBERS)}
                assert torch.equal(answer.tensors["total"], deltas["berlin"] + deltas["paris"])
    assert len(registry.meetings) <= Registry.KEPT


def test_a_message_sent_twice_counts_once(certs):
    registry = Registry(["berlin"])
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        message = Message({"key": "a"}, {"delta": torch.ones(3)})
        first, _ = in_threads(lambda: link.meet(message, 100), lambda: add_up(registry, "a"))
        again = link.meet(message, 100)  # the answer had been lost on the way
    assert torch.equal(first.tensors["total"], again.tensors["total"])


def test_a_coordinator_that_is_replaced_is_only_waited_for(certs):
    registry = Registry(["berlin"])
    with serving(certs, registry) as port:
        pass
    with linked(certs, port, "berlin") as link:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(link.meet(Message({"key": "a"}, {"delta": torch.ones(3)}), 100))
        )
        thread.start()
        time.sleep(0.3)
        with serving(certs, registry, port):
            add_up(registry, "a")
            thread.join(20)
    assert torch.equal(answers[0].tensors["total"], torch.ones(3))


def test_a_coordinator_that_stays_away_is_lost(certs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        linked(certs, port, "berlin", retry_seconds=0.3) as link,
        pytest.raises(LinkLostError, match="cannot be reached"),
    ):
        link.meet(Message({"key": "a"}), 100)


def test_presence_comes_and_goes_with_the_link(certs):
    registry = Registry(MEMBERS)
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        with link.present():
            wait_for(lambda: registry.present() == ["berlin"])
        wait_for(lambda: registry.present() == [])


def test_a_second_launch_under_one_name_is_refused(certs):
    registry = Registry(MEMBERS)
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link, link.present():
        wait_for(lambda: registry.present() == ["berlin"])
        with pytest.raises(RefusedError, match="berlin is here already"):
            registry.enter("berlin", "another")
        registry.enter("berlin", link.session)  # the same launch, whose stream was broken


def test_the_others_go_on_without_one_that_has_vanished(certs):
    registry = Registry(MEMBERS, grace_seconds=0.5, min_members=1)
    with serving(certs, registry) as port:
        with linked(certs, port, "paris") as link, link.present():
            wait_for(lambda: registry.present() == ["paris"])
        with linked(certs, port, "berlin") as link, link.present():
            message = Message({"key": "a"}, {"delta": torch.ones(2)})
            began = time.monotonic()
            answer, _ = in_threads(lambda: link.meet(message, 100), lambda: add_up(registry, "a"))
            assert time.monotonic() - began < 5
        with linked(certs, port, "paris") as link, pytest.raises(LinkRefusedError, match="a has ended without paris"):
            link.meet(message, 100)
    assert answer.header["members"] == ["berlin"]


def test_join_refuses_what_differs(certs):
    registry = Registry(MEMBERS)
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        assert link.join({"model": "cnn"}).header == {"name": "berlin"}
        with pytest.raises(LinkRefusedError, match="model=gpt, but the coordinator has cnn"):
            link.join({"model": "gpt"})


def test_strangers_do_not_reach_a_handler(certs, tmp_path):
    certify(tmp_path / "other", ["coordinator", "berlin"])
    registry = Registry(MEMBERS)
    with serving(certs, registry) as port:
        with linked(tmp_path / "other", port, "berlin", 0.5) as link, pytest.raises(LinkLostError):
            link.meet(Message({"key": "a"}), 100)
        with linked(certs, port, "rome", 0.5) as link, pytest.raises(LinkRefusedError, match="rome is no member"):
            link.meet(Message({"key": "a"}), 100)
        authority = (certs / "ca.pem").read_bytes()
        for channel in (
            grpc.insecure_channel(f"127.0.0.1:{port}"),
            grpc.secure_channel(
                f"127.0.0.1:{port}",
                grpc.ssl_channel_credentials(authority),
                [("grpc.ssl_target_name_override", "coordinator")],
            ),
        ):
            with channel, pytest.raises(grpc.RpcError):
                list(channel.stream_stream(MEET)(iter([b"{}"]), timeout=2))
    assert registry.meetings.keys() <= {"a"}
    assert not any(meeting.brought for meeting in registry.meetings.values())


def test_a_coordinator_of_another_authority_is_refused(certs, tmp_path):
    certify(tmp_path / "other", ["coordinator"])
    with (
        serving(tmp_path / "other", Registry(MEMBERS)) as port,
        linked(certs, port, "berlin", 0.5) as link,
        pytest.raises(LinkLostError),
    ):
        link.meet(Message({"key": "a"}), 100)


def test_too_large_a_message_is_refused_by_its_header(certs):
    registry = Registry(MEMBERS)
    with (
        serving(certs, registry) as port,
        linked(certs, port, "berlin") as link,
        pytest.raises(LinkRefusedError, match="tensors of 4,000,000 bytes; at most 1,048,576"),
    ):
        link.meet(Message({"key": "a"}, {"delta": torch.zeros(1_000_000)}), 100)
