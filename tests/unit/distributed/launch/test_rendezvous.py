"""The rendezvous of several nodes, in the threads of one process: who takes part, who is lost, and who is refused."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from trainer.distributed.launch import rendezvous as module
from trainer.distributed.launch.channel import Channel, UntrustedError
from trainer.distributed.launch.reachability import parse_endpoint
from trainer.distributed.launch.rendezvous import MemberRendezvous, open_rendezvous
from trainer.distributed.launch.world import Interrupted, NodesUnreachableError, Rendezvous, World
from trainer.distributed.token import TOKEN

SECRET = "a secret of this test"


class Nodes:
    """Launchers of one run, each with a number of workers."""

    def __init__(self, stack: ExitStack, nodes: int | tuple[int, int], host: str = "127.0.0.1"):
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            self.port = free.getsockname()[1]
        self.endpoint = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.nodes, self.stack, self.threads = nodes, stack, stack.enter_context(ThreadPoolExecutor(8))
        self.opened: list[ExitStack] = []
        self.is_stopped = False
        stack.callback(self.stop)

    def open(self) -> tuple[Rendezvous, ExitStack]:
        """Open the rendezvous of one more node; the first one is the host."""
        own = self.stack.enter_context(ExitStack())
        number = len(self.opened)
        self.opened.append(own)

        def agree(world: World) -> str:
            return f"the text of node {number}"

        return own.enter_context(open_rendezvous(self.nodes, self.endpoint, None, agree, lambda: False)), own

    def start(self, rendezvous: Rendezvous, workers: int = 1, restart: int = 0) -> Future[World]:
        return self.threads.submit(rendezvous.next_world, workers, restart, lambda: self.is_stopped)

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def new_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Nodes]]:
    monkeypatch.setenv(TOKEN, SECRET)
    monkeypatch.setattr(module, "MAX_NODES_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(module, "LAST_CALL_SECONDS", 0.2)
    monkeypatch.setattr(module, "RECONNECT_TIMEOUT_SECONDS", 0.5)
    with ExitStack() as stack:
        yield lambda nodes, host="127.0.0.1": Nodes(stack, nodes, host)


def worlds_of(futures: list[Future[World]]) -> list[World]:
    worlds = [future.result(10) for future in futures]
    for world in worlds:
        if world.listener:
            assert world.listener.getsockname()[1] == world.port
            world.listener.close()
    return worlds


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_all_nodes_get_one_world_in_the_same_order_each_time(new_nodes: Callable[..., Nodes], host: str) -> None:
    nodes = new_nodes(3, host)
    launchers = [nodes.open()[0] for _ in range(3)]
    for restart in (0, 1):
        starts = [nodes.start(launcher, workers, restart) for workers, launcher in enumerate(launchers, start=1)]
        worlds = worlds_of(starts)
        assert sorted(world.node for world in worlds) == [0, 1, 2]
        assert {world.workers for world in worlds} == {tuple(world.workers) for world in worlds[:1]}
        assert sorted(worlds[0].workers) == [1, 2, 3]
        assert all(world.workers[world.node] == number for number, world in enumerate(worlds, start=1))
        assert len({(world.host, world.port, world.restart) for world in worlds}) == 1
        assert worlds[0].restart == restart
        assert [world.listener is not None for world in worlds] == [world.node == 0 for world in worlds]
        assert {launcher.agreed for launcher in launchers} == {"the text of node 0"}
        assert not any(launcher.membership_changed() for launcher in launchers)


def test_the_largest_number_of_restarts_counts(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes(2)
    first, second = (nodes.open()[0] for _ in range(2))
    assert {world.restart for world in worlds_of([nodes.start(first, 1, 2), nodes.start(second, 1, 5)])} == {5}


def test_a_lost_node_is_noticed_at_once_and_a_new_one_joins(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes((1, 2))
    first, second = (nodes.open()[0] for _ in range(2))
    worlds_of([nodes.start(first), nodes.start(second)])
    assert isinstance(second, MemberRendezvous) and second._channel
    second._channel.close()  # as the kernel of a machine does whose launcher is killed
    assert first.membership_changed(5)
    assert worlds_of([nodes.start(first, 1, 1)])[0].workers == (1,)
    third = nodes.open()[0]
    waits = nodes.start(third, 2)
    assert first.membership_changed(5)
    assert {world.restart for world in worlds_of([nodes.start(first, 1, 2), waits])} == {2}
    assert third.agreed == "the text of node 0" and not first.membership_changed() and not third.membership_changed()


def test_a_node_that_restarts_is_announced_to_all_others(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes(3)
    launchers = [nodes.open()[0] for _ in range(3)]
    worlds_of([nodes.start(launcher) for launcher in launchers])
    launchers[2].announce_restart()
    assert all(launcher.membership_changed(5) for launcher in launchers)


def test_one_node_too_many_waits_until_another_leaves_its_place(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes((1, 2))
    first, second = (nodes.open()[0] for _ in range(2))
    worlds_of([nodes.start(first), nodes.start(second)])
    waits = nodes.start(nodes.open()[0])
    assert not first.membership_changed(0.5) and not waits.done()
    assert isinstance(second, MemberRendezvous) and second._channel
    second._channel.close()
    assert first.membership_changed(5)
    assert {world.workers for world in worlds_of([nodes.start(first, 1, 1), waits])} == {(1, 1)}


@pytest.mark.parametrize("leaver", [0, 1])
def test_when_the_run_has_ended_on_a_node_nobody_is_lost_and_nobody_joins(
    new_nodes: Callable[..., Nodes], leaver: int
) -> None:
    nodes = new_nodes((1, 2))
    launchers = [nodes.open() for _ in range(2)]
    worlds_of([nodes.start(launcher) for launcher, _ in launchers])
    launchers[leaver][1].close()
    stays = launchers[1 - leaver][0]
    assert not stays.membership_changed(0.5)
    with pytest.raises(NodesUnreachableError, match="has ended on another node"):
        nodes.start(stays, 1, 1).result(10)


def test_a_waiting_node_can_be_stopped(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes(2)
    waits = nodes.start(nodes.open()[0])
    nodes.stop()
    with pytest.raises(Interrupted):
        waits.result(5)


def test_when_the_host_is_lost_the_others_say_so(new_nodes: Callable[..., Nodes]) -> None:
    nodes = new_nodes(2)
    (first, _), (second, _) = (nodes.open() for _ in range(2))
    worlds_of([nodes.start(first), nodes.start(second)])
    first._ended.set()  # pyright: ignore[reportAttributeAccessIssue] (it says nothing)
    first._listener.shutdown(socket.SHUT_RDWR)  # pyright: ignore[reportAttributeAccessIssue]
    first._listener.close()  # pyright: ignore[reportAttributeAccessIssue]
    next(filter(None, first._offers)).close()  # pyright: ignore[reportAttributeAccessIssue]
    assert second.membership_changed(5)
    with pytest.raises(NodesUnreachableError, match="no answer"):
        nodes.start(second, 1, 1).result(10)


def test_strangers_are_refused_and_stall_nothing(
    new_nodes: Callable[..., Nodes], capsys: pytest.CaptureFixture[str]
) -> None:
    """They say nothing, or anything, or hold another token; one sends back what it hears."""
    nodes = new_nodes(2)
    first = nodes.open()[0]
    begun = nodes.start(first)
    for message in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000):
        nodes.stack.enter_context(socket.create_connection(("127.0.0.1", nodes.port))).sendall(message)
    stranger = Channel(nodes.stack.enter_context(socket.create_connection(("127.0.0.1", nodes.port))), b"x", True)
    stranger.send({"left": True})
    echo = nodes.stack.enter_context(socket.create_connection(("127.0.0.1", nodes.port)))
    echo.sendall(echo.recv(32))
    second = nodes.open()[0]
    worlds_of([begun, nodes.start(second)])
    assert not first.membership_changed(0.3) and not second.membership_changed()
    assert capsys.readouterr().err == "refused 127.0.0.1: it does not hold the token of this run\n"


def test_a_node_with_another_token_is_told_so(
    new_nodes: Callable[..., Nodes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = new_nodes(2)
    nodes.start(nodes.open()[0])
    monkeypatch.setenv(TOKEN, "another secret")
    with pytest.raises(NodesUnreachableError, match=r"holds our token.\n  set launch.token_file="):
        nodes.start(nodes.open()[0]).result(10)


def test_nothing_but_json_is_read_and_no_message_twice() -> None:
    """A message that is sent again, or back to its sender, is refused."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads, ours, theirs:
        answering = threads.submit(Channel, theirs, b"token", False)
        caller, answerer = Channel(ours, b"token", True), answering.result(5)
        sent: list[bytes] = []
        caller._connection = type("Copying", (), {"sendall": lambda _, part: sent.append(part), "recv": ours.recv})()
        caller.send({"beat": True})
        ours.sendall(sent[0])
        assert answerer.receive() == {"beat": True}
        ours.sendall(sent[0])
        with pytest.raises(UntrustedError):
            answerer.receive()
        theirs.sendall(sent[0])
        with pytest.raises(UntrustedError):
            caller.receive()


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [("node0:29500", "node0"), ("[::1]:29500", "::1"), ("::1:29500", "::1"), ("1.2.3.4:29500", "1.2.3.4")],
)
def test_endpoints(endpoint: str, host: str) -> None:
    assert parse_endpoint(endpoint) == (host, 29500)


@pytest.mark.parametrize(
    "endpoint", [None, "", "node0", ":29500", "node0:", "node0:x", "node0:0", "node0:70000", "[]:1"]
)
def test_endpoints_that_are_none(endpoint: str | None) -> None:
    with pytest.raises(ValueError, match=r"launch.rdzv_endpoint=.*\n  valid: host:port"):
        parse_endpoint(endpoint)
