"""Links over real mutual TLS on loopback: what is brought comes back as a result, and strangers are refused."""

import shutil
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import grpc
import pytest
import torch

from trainer.federation import registry as registries
from trainer.federation.certificates import certify, load_credentials
from trainer.federation.link import MEET, BehindError, Link, LinkLostError, LinkRefusedError
from trainer.federation.messages import Limit, Message
from trainer.federation.registry import Meeting, RefusedError, Registry
from trainer.federation.server import Server
from trainer.federation.spool import Spool

MEMBERS = ("berlin", "paris")
HEADER = {"model": "cnn"}
LIMIT = Limit(1 << 20)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", *MEMBERS, "rome"])
    return folder


class Welcome:
    """Admits members with the same model."""

    def admit(self, name, header):
        if header.get("model") != "cnn":
            raise RefusedError(f"model={header.get('model')}, but the coordinator has cnn")

    def welcome(self):
        return Message({"members": list(MEMBERS)})


@pytest.fixture
def make_registry(tmp_path):
    return lambda *arguments, **named: Registry(Spool(tmp_path / "meetings"), *arguments, **named)


@contextmanager
def serving(certs, registry, port=0):
    server = Server(f"127.0.0.1:{port}", load_credentials(certs, "coordinator"), registry, Welcome())
    try:
        yield server.port
    finally:
        server.stop(0)


@contextmanager
def linked(certs, port, name, retry_seconds=10.0, header=HEADER, is_stopping=lambda: False):
    link = Link(f"127.0.0.1:{port}", load_credentials(certs, name), retry_seconds, is_stopping)
    with link.joined(header):
        yield link


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


def add_up(registry, key, limit=LIMIT):
    brought = registry.gather(key, limit)
    total = sum(message.tensors["delta"] for message in brought.values())
    registry.publish(key, Message({"key": key}, {"total": total}))


def meet_in_vain(link):
    with pytest.raises(LinkLostError):
        link.meet(Message({"key": "a"}), LIMIT)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_sum_comes_back_to_both(certs, make_registry):
    registry = make_registry(MEMBERS)
    deltas = {name: torch.randn(70_000, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(MEMBERS)}
    with ExitStack() as stack:
        port = stack.enter_context(serving(certs, registry))
        links = {name: stack.enter_context(linked(certs, port, name)) for name in MEMBERS}
        for number in range(3):
            key = f"rounds/{number}/training"
            meets = [
                lambda name=name, key=key: links[name].meet(Message({"key": key}, {"delta": deltas[name]}), LIMIT)
                for name in reversed(MEMBERS)
            ]
            *answers, _ = in_threads(*meets, lambda key=key: add_up(registry, key))
            for answer in answers:
                assert answer.header == {"key": key, "counted": list(MEMBERS)}
                assert torch.equal(answer.tensors["total"], deltas["berlin"] + deltas["paris"])


def test_a_message_sent_twice_counts_once(certs, make_registry):
    registry = make_registry(["berlin"])
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        message = Message({"key": "a"}, {"delta": torch.ones(3)})
        first, _ = in_threads(lambda: link.meet(message, LIMIT), lambda: add_up(registry, "a"))
        again = link.meet(message, LIMIT)  # the answer had been lost on the way
    assert torch.equal(first.tensors["total"], again.tensors["total"])


def test_a_message_that_is_half_sent_never_counts(certs, make_registry):
    """Its site dies while it sends. The launch that follows sends it anew."""
    registry, key, dies = make_registry(["berlin"]), "rounds/0/training", threading.Event()
    whole = Message({"key": key}, {"delta": torch.ones(200_000)})
    with serving(certs, registry) as port:
        gathering = threading.Thread(target=add_up, args=(registry, key))
        gathering.start()
        with linked(certs, port, "berlin") as link:
            first, second, _ = Message({**whole.header, "session": link.session, "saved": 0}, whole.tensors).parts()

            def parts():
                yield from (first, second)
                dies.wait()

            call = link.channel.stream_stream(MEET)(parts())
            folder = registry.spool.folder / key
            wait_for(lambda: any(path.stat().st_size > len(second) for path in folder.glob(".berlin.*")))
            call.cancel()
            dies.set()
            wait_for(lambda: not list(folder.iterdir()))
        assert registry.meetings[key].counted is None
        with linked(certs, port, "berlin") as link:
            assert torch.equal(link.meet(whole, LIMIT).tensors["total"], torch.ones(200_000))
        gathering.join()


def test_the_end_does_not_wait_for_those_who_have_left_with_their_result(make_registry):
    """A site leaves when it has its result and finds no coordinator for as long as it tries."""
    registry = make_registry(MEMBERS)
    for name in MEMBERS:
        with registry.spool.receiving("end/artifacts", name) as file:
            for part in Message({"key": "end/artifacts"}).parts():
                file.write(part)
    registry = make_registry(MEMBERS)  # of a coordinator that was away meanwhile
    assert registry.gather("end/run", Limit(), farewell_seconds=0.2) == {}
    has_none = make_registry([*MEMBERS, "rome"])
    asked = threading.Event()
    threading.Timer(0.6, asked.set).start()
    assert has_none.gather("end/other", Limit(), is_stopping=asked.is_set, farewell_seconds=0.2) is None


def test_a_coordinator_that_is_replaced_is_only_waited_for(certs, make_registry):
    answers, message = [], Message({"key": "a"}, {"delta": torch.ones(3)})
    with ExitStack() as stack:
        with serving(certs, make_registry(["berlin"])) as port:
            link = stack.enter_context(linked(certs, port, "berlin"))
            thread = threading.Thread(target=lambda: answers.append(link.meet(message, LIMIT)))
            thread.start()
        with serving(certs, registry := make_registry(["berlin"]), port):
            add_up(registry, "a")
            thread.join(20)
    assert torch.equal(answers[0].tensors["total"], torch.ones(3))


def test_a_coordinator_started_again_makes_the_same_result_of_the_same_messages(certs, make_registry):
    message = Message({"key": "rounds/3/training"}, {"delta": torch.ones(3)})
    with serving(certs, registry := make_registry(["berlin"])) as port, linked(certs, port, "berlin") as link:
        first, _ = in_threads(lambda: link.meet(message, LIMIT), lambda: add_up(registry, "rounds/3/training"))
    with serving(certs, registry := make_registry(["berlin"])) as port, linked(certs, port, "berlin") as link:
        again = link.meet(Message({"key": "rounds/3/training"}, {"delta": torch.zeros(3)}), LIMIT)
        add_up(registry, "rounds/3/training")  # of what it has on its disk
        last = link.meet(message, LIMIT)
    for result in (again, last):
        assert torch.equal(result.tensors["total"], first.tensors["total"])


def test_a_port_has_one_coordinator(certs, make_registry):
    registry = make_registry(MEMBERS)
    with (
        serving(certs, registry) as port,
        pytest.raises(ValueError, match=f"site.listen=127.0.0.1:{port} cannot be had"),
        serving(certs, registry, port),
    ):
        pass


def test_a_coordinator_that_stays_away_is_lost(certs):
    link = Link(f"127.0.0.1:{free_port()}", load_credentials(certs, "berlin"), 0.3)
    with pytest.raises(LinkLostError, match="cannot be reached"), link.joined(HEADER):
        pass


def test_a_site_that_is_asked_to_stop_waits_no_more(certs, make_registry):
    asked = threading.Event()
    with (
        serving(certs, make_registry(MEMBERS)) as port,
        linked(certs, port, "berlin", is_stopping=asked.is_set) as link,
    ):
        threading.Timer(0.2, asked.set).start()
        with pytest.raises(LinkLostError, match="asked to stop"):
            link.meet(Message({"key": "a"}, {"delta": torch.ones(3)}), LIMIT)


def test_presence_comes_and_goes_with_the_link(certs, make_registry):
    registry = make_registry(MEMBERS)
    with serving(certs, registry) as port:
        with linked(certs, port, "berlin"):
            assert registry.present() == ["berlin"]
        wait_for(lambda: registry.present() == [])


def test_a_second_launch_under_one_name_is_refused(certs, make_registry, monkeypatch):
    monkeypatch.setattr(registries, "SILENCE_SECONDS", 0.3)
    registry = make_registry(MEMBERS)
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        with pytest.raises(LinkRefusedError, match="berlin is here already"), linked(certs, port, "berlin"):
            pass
        registry.enter("berlin", link.session)  # the same launch, whose stream was broken


def test_a_launch_that_is_started_again_waits_for_the_end_of_the_dead_one(make_registry):
    registry = make_registry(MEMBERS)
    registry.enter("berlin", "dead")
    threading.Timer(0.3, registry.leave, ("berlin", "dead")).start()  # a host that is lost says no good-bye
    registry.enter("berlin", "new")
    registry.check("berlin", "new")


def test_a_broken_stream_that_is_noticed_late_does_not_end_its_successor(make_registry):
    registry = make_registry(MEMBERS)
    registry.enter("berlin", "one")
    registry.enter("berlin", "one")  # it has joined again
    registry.leave("berlin", "one")
    registry.check("berlin", "one")
    registry.leave("berlin", "one")
    assert registry.present() == []


def test_a_site_that_has_waited_for_long_tries_as_long_as_any_other(certs, make_registry):
    """The time of its tries begins when the link breaks, not when it began to wait for the others."""
    with ExitStack() as stack:
        with serving(certs, make_registry(MEMBERS)) as port:
            link = stack.enter_context(linked(certs, port, "berlin", retry_seconds=1.0))
            waiting = threading.Thread(target=meet_in_vain, args=(link,))
            waiting.start()
            time.sleep(1.0)
        left = time.monotonic()
        waiting.join(20)
    assert 1.0 <= time.monotonic() - left < 8


def test_the_others_go_on_without_one_that_has_vanished(certs, make_registry):
    registry = make_registry(MEMBERS, grace_seconds=0.5, min_members=1)
    key = "rounds/0/training"
    message = Message({"key": key}, {"delta": torch.ones(2)})
    state = Message({"values": {"rounds": 1}}, {"parameters": torch.ones(2)})
    with serving(certs, registry) as port, ExitStack() as stack:
        with linked(certs, port, "paris"):
            pass
        berlin = stack.enter_context(linked(certs, port, "berlin"))
        answer, _ = in_threads(lambda: berlin.meet(message, LIMIT), lambda: add_up(registry, key))
        assert answer.header["counted"] == ["berlin"]
        paris = stack.enter_context(linked(certs, port, "paris"))
        assert paris.meet(message, LIMIT).header["counted"] == ["berlin"]
        assert not berlin.fetch(Message({"rounds": 0}), LIMIT).tensors  # it has missed nothing
        late, early, after, brought = in_threads(
            lambda: paris.fetch(Message({"rounds": 0}), LIMIT),
            lambda: berlin.meet(Message({"key": "rounds/1/training"}), LIMIT),
            lambda: wait_for(lambda: registry._state) or paris.meet(Message({"key": "rounds/1/training"}), LIMIT),
            lambda: [
                registry.gather("rounds/1/training", LIMIT, lambda: state),
                registry.publish("rounds/1/training", Message({})),
            ],
        )
    assert late.header == state.header
    assert torch.equal(late.tensors["parameters"], torch.ones(2))
    assert early.header["counted"] == after.header["counted"] == list(MEMBERS)
    assert brought[0].keys() == set(MEMBERS)


def test_results_are_kept_until_every_member_has_saved_them(certs, make_registry):
    saved = 0
    registry = make_registry(MEMBERS, saved=lambda: saved)
    with serving(certs, registry) as port, ExitStack() as stack:
        links = [stack.enter_context(linked(certs, port, name)) for name in MEMBERS]
        for index, of_members in enumerate([(0, 0), (1, 0), (2, 1), (3, 3)]):
            key, saved = f"rounds/{index}/training", index
            meets = [
                lambda link=link, key=key, own=own: link.meet(
                    Message({"key": key, "saved": own}, {"delta": torch.ones(1)}), LIMIT
                )
                for link, own in zip(links, of_members, strict=True)
            ]
            in_threads(*meets, lambda key=key: add_up(registry, key))
            kept = [f"rounds/{each}/training" for each in range(min(of_members), index + 1)]
            wait_for(lambda kept=kept: list(registry.meetings) == registry.spool.meetings() == kept)
        assert registry.spool.members("rounds/3/training") == set(MEMBERS)
        with pytest.raises(BehindError, match="rounds/2/training is over"):
            links[0].meet(Message({"key": "rounds/2/training"}), LIMIT)


def test_join_refuses_what_differs(certs, make_registry):
    with (
        serving(certs, make_registry(MEMBERS)) as port,
        pytest.raises(LinkRefusedError, match="model=gpt, but the coordinator has cnn"),
        linked(certs, port, "berlin", header={"model": "gpt"}),
    ):
        pass


def test_strangers_do_not_reach_a_handler(certs, make_registry, tmp_path):
    certify(tmp_path / "other", ["coordinator", "berlin"])
    registry = make_registry(MEMBERS)
    with serving(certs, registry) as port:
        with pytest.raises(LinkLostError), linked(tmp_path / "other", port, "berlin", 0.5):
            pass
        with pytest.raises(LinkRefusedError, match="rome is no member"), linked(certs, port, "rome"):
            pass
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
    assert not registry.meetings


def test_a_coordinator_of_another_authority_is_refused(certs, make_registry, tmp_path):
    certify(tmp_path / "other", ["coordinator"])
    with (
        serving(tmp_path / "other", make_registry(MEMBERS)) as port,
        pytest.raises(LinkLostError),
        linked(certs, port, "berlin", 0.5),
    ):
        pass


def test_too_large_a_message_is_refused_by_its_header(certs, make_registry):
    registry = make_registry(["berlin"])
    with serving(certs, registry) as port, linked(certs, port, "berlin") as link:
        gathering = threading.Thread(target=add_up, args=(registry, "a"))
        gathering.start()
        with pytest.raises(LinkRefusedError, match="tensors of 4,000,000 bytes; at most 1,048,576"):
            link.meet(Message({"key": "a"}, {"delta": torch.zeros(1_000_000)}), LIMIT)
        link.meet(Message({"key": "a"}, {"delta": torch.zeros(1)}), LIMIT)
        gathering.join()


def test_a_message_wakes_up_the_coordinator_and_no_other_member(make_registry, monkeypatch):
    monkeypatch.setattr(registries, "WAIT_SECONDS", 60.0)
    registry, looked = make_registry(MEMBERS), []

    def is_waiting():
        looked.append(time.monotonic())
        return True

    registry.meetings["a"] = Meeting(Limit())
    waiting = threading.Thread(target=registry.result, args=("paris", "a", is_waiting))
    waiting.start()
    wait_for(lambda: looked)
    for _ in range(5):
        registry.bring("berlin", "a")
        time.sleep(0.02)
    assert len(looked) == 1
    registry.publish("a", Message({"key": "a"}))
    waiting.join(10)
    assert not waiting.is_alive()


def test_renewed_certificates_are_taken_at_the_next_start_of_each_side(certs, tmp_path, make_registry):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(certs, old)
    registry, message = make_registry(["berlin"]), Message({"key": "a"}, {"delta": torch.ones(2)})
    with serving(old, registry) as port:
        with linked(old, port, "berlin") as link:
            shutil.copytree(old, new)
            certify(new, ["berlin", "coordinator"], renew=True)
            first, _ = in_threads(lambda: link.meet(message, LIMIT), lambda: add_up(registry, "a"))
        wait_for(lambda: registry.present() == [])
        with linked(new, port, "berlin") as link:  # the site was started again, and the coordinator not
            assert torch.equal(link.meet(message, LIMIT).tensors["total"], first.tensors["total"])
    with serving(new, registry, port), linked(old, port, "berlin") as link:  # and now the other way round
        assert torch.equal(link.meet(message, LIMIT).tensors["total"], first.tensors["total"])
