"""Why a site does not reach the coordinator: each cause has its sentence, from a real socket."""

from __future__ import annotations

import datetime
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.federation.test_certificates import at
from trainer.federation.certificates import Credentials, certify, load_credentials
from trainer.federation.handshake import shake_hands
from trainer.federation.link import Link
from trainer.federation.probe import probe_link
from trainer.federation.registry import Registry
from trainer.federation.server import Server
from trainer.federation.spool import Spool


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "certs"
    certify(folder, ["coordinator", "berlin"])
    return folder


class Nobody:
    """Admits nobody."""

    def admit(self, name, header):
        raise AssertionError

    def welcome(self):
        return None


@contextmanager
def serving(folder: Path, name: str = "coordinator") -> Iterator[int]:
    """Listen with the certificate of a member, which may have expired: yield the port."""
    texts = [(folder / file).read_bytes() for file in ("ca.pem", f"{name}.pem", f"{name}.key")]
    credentials = Credentials(name, *texts, datetime.datetime.now(datetime.UTC))
    server = Server("127.0.0.1:0", credentials, Registry(Spool(folder / "meetings"), ["berlin"]), Nobody())
    try:
        yield server.port
    finally:
        server.stop(0)


@contextmanager
def answering(*answers: bytes, hang_up: bool = True) -> Iterator[int]:
    """Listen, and send each connection the bytes after it has sent some: yield the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    connections = []

    def answer() -> None:
        try:
            while True:
                connection = listening.accept()[0]
                connections.append(connection)
                if answers:
                    connection.recv(1 << 14)
                for each in answers:
                    connection.sendall(each)
                if hang_up:
                    connection.close()
        except OSError:
            return

    thread = threading.Thread(target=answer)
    thread.start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()
    for connection in connections:
        connection.close()


def renewed(certs: Path, folder: Path, name: str, days: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder in which a member was renewed some days from now, for ten days."""
    shutil.copytree(certs, folder)
    with monkeypatch.context() as patch:
        at(patch, days)
        certify(folder, [name], days=10, renew=True)
    return folder


def refusal(port: int, certs: Path, host: str = "127.0.0.1") -> str:
    with pytest.raises(ValueError, match="\n  ") as refused:
        shake_hands(host, port, certs, "berlin")
    return str(refused.value)


def test_hands_are_shaken_with_the_coordinator(certs: Path) -> None:
    with serving(certs) as port:
        assert shake_hands("localhost", port, certs, "berlin") == f"localhost:{port}, TLSv1.3"


def test_another_authority_on_either_side(certs: Path, tmp_path: Path) -> None:
    certify(tmp_path / "other", ["coordinator", "berlin"])
    with serving(tmp_path / "other") as port:
        text = refusal(port, certs)
        assert "(CN=coordinator) is signed by another authority (CN=silotrain authority) than ca.pem" in text
    # The site trusts the coordinator's authority, and is certified by another.
    for name in ("berlin.pem", "berlin.key"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
    shutil.copy(certs / "ca.pem", tmp_path / "ca.pem")
    with serving(certs) as port:
        text = refusal(port, tmp_path)
    assert (
        "is the coordinator, and refuses the certificate of berlin" in text and "is signed by another authority" in text
    )


@pytest.mark.parametrize(("days", "sentence"), [(-100, "expired on 20"), (100, "is valid from 20")])
def test_dates_of_the_coordinators_certificate(
    certs: Path, tmp_path: Path, days: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = renewed(certs, tmp_path / "certs", "coordinator", days, monkeypatch)
    with serving(folder) as port:
        text = refusal(port, certs)
    assert sentence in text and "certify ... coordinator --renew" in text


@pytest.mark.parametrize("days", [-100, 100])
def test_dates_of_the_site_by_the_clock_of_the_coordinator(
    certs: Path, tmp_path: Path, days: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = renewed(certs, tmp_path / "certs", "berlin", days, monkeypatch)
    with serving(certs) as port:
        text = refusal(port, folder)
    assert "not by the coordinator's clock" in text


def test_a_site_in_the_place_of_the_coordinator(certs: Path) -> None:
    with serving(certs, "berlin") as port:
        assert "is that of berlin, which is not coordinator" in refusal(port, certs)


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "answers in plain text: another program has this port"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "answers in plain text: another program has this port"),
        ([], "takes connections, and hangs up in the TLS handshake: another program has this port"),
    ],
)
def test_another_program_on_the_port(certs: Path, answers: list[bytes], sentence: str) -> None:
    with answering(*answers) as port:
        assert f"127.0.0.1:{port} {sentence}" in refusal(port, certs)


def test_silence(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.federation.handshake.TIMEOUT_SECONDS", 0.2)
    with answering(hang_up=False) as port:
        assert "does not answer a TLS handshake within 0.2 s" in refusal(port, certs)


def test_no_listener_no_name_no_way(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert f"nothing listens at 127.0.0.1:{free.getsockname()[1]}" in refusal(free.getsockname()[1], certs)
    assert "the name no-such-host.invalid has no address here" in refusal(7070, certs, "no-such-host.invalid")
    monkeypatch.setattr("trainer.federation.handshake.TIMEOUT_SECONDS", 0.2)
    with socket.create_server(
        ("127.0.0.1", 0), backlog=0
    ) as full:  # its queue of one is full: nothing more is answered
        port = full.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(("127.0.0.1", port))
            assert "does not answer within 0.2 s: a firewall on the way drops" in refusal(port, certs)


class Proxy(BaseHTTPRequestHandler):
    """Passes CONNECT on, if it is asked with the right word."""

    def do_CONNECT(self) -> None:
        if self.headers["Proxy-Authorization"] != "Basic bWU6d29yZA==":
            self.send_error(407)
            return
        self.send_response(200)
        self.end_headers()
        host, port = self.path.split(":")
        with socket.create_connection((host, int(port))) as there:
            back = threading.Thread(target=pass_on, args=(there, self.connection), daemon=True)
            back.start()
            pass_on(self.connection, there)
            back.join(5)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while received := source.recv(1 << 16):
            target.sendall(received)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture
def proxy() -> Iterator[str]:
    """Yield the address of a proxy."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_way_through_a_proxy_is_the_one_that_grpc_takes(
    certs: Path, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.federation.probe.FILL_SECONDS", 0.02)
    monkeypatch.setenv("https_proxy", f"http://me:word@{proxy}")
    with serving(certs) as port:
        way = shake_hands("127.0.0.1", port, certs, "berlin")
        assert way == f"127.0.0.1:{port} through the proxy {proxy}, TLSv1.3"
        link = Link(f"127.0.0.1:{port}", load_credentials(certs, "berlin"), 0.0)
        assert probe_link(link.channel).up > 0
        link.channel.close()
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        assert "407" in refusal(port, certs)
        monkeypatch.setenv("no_grpc_proxy", "127.0.0.1")
        assert shake_hands("127.0.0.1", port, certs, "berlin") == f"127.0.0.1:{port}, TLSv1.3"
