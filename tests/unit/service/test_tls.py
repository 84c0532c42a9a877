"""Certificates: refused ones, and those that HTTP and gRPC take."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import certificates
from tests.support.certificates import Authority, Signed
from tests.support.exported import write_linear
from tests.support.serving import serving
from trainer.service.server import Server
from trainer.service.tls import ServerCertificates

pytestmark = pytest.mark.skipif(bool(certificates.why_not()), reason=certificates.why_not())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def signed(authority: Authority) -> Signed:
    return authority.sign("server")


def test_a_certificate_and_its_key_are_taken(authority: Authority, signed: Signed) -> None:
    for client_authority in (None, authority.certificate):
        assert ServerCertificates(signed.certificate, signed.key, client_authority).grpc_credentials()


def test_files_that_are_not_a_certificate_and_its_key_are_refused(
    authority: Authority, signed: Signed, tmp_path: Path
) -> None:
    other = authority.sign("other")
    text = tmp_path / "text.pem"
    text.write_text("text")
    text.chmod(0o600)
    certificate, key, missing = signed.certificate, signed.key, tmp_path / "missing.pem"
    refused = {
        (missing, key, None): f"--tls: CERT {missing}: No such file or directory",
        (certificate, tmp_path, None): f"--tls: KEY {tmp_path}: Is a directory",
        (certificate, key, missing): f"--ca: CA {missing}: No such file or directory",
        (certificate, other.key, None): "key values mismatch",
        (text, key, None): f"--tls: CERT {text} and KEY {key} are no certificate and its key",
        (certificate, text, None): f"--tls: CERT {certificate} and KEY {text} are no certificate and its key",
        (certificate, key, text): f"--ca: {text} has no certificate in PEM",
    }
    for files, message in refused.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            ServerCertificates(*files)


def test_a_key_with_a_passphrase_is_refused_without_asking_for_it(signed: Signed, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    certificates.run("pkey", "-in", str(signed.key), "-aes128", "-passout", "pass:secret", "-out", str(locked))
    with pytest.raises(ValueError, match="without a passphrase"):
        ServerCertificates(signed.certificate, locked)


def test_a_key_that_others_may_read_is_refused(signed: Signed, tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    key.write_bytes(signed.key.read_bytes())
    key.chmod(0o644)
    with pytest.raises(ValueError, match=rf"KEY {key} may be read by others: its mode is 644\n  chmod 600 {key}"):
        ServerCertificates(signed.certificate, key)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_linear(root / "linear", 1)
    return root


@pytest.fixture(scope="module")
def encrypted(models: Path, signed: Signed) -> Iterator[Server]:
    """Serve with a certificate."""
    with serving(models, certificates=ServerCertificates(signed.certificate, signed.key)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(models: Path, authority: Authority, signed: Signed) -> Iterator[Server]:
    """Serve clients alone that have a certificate too."""
    both = ServerCertificates(signed.certificate, signed.key, authority.certificate)
    with serving(models, certificates=both) as server:
        yield server


def by_http(server: Server, authority: Authority, client: Signed | None = None) -> bool:
    """Ask the server over HTTPS; return whether it answers."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if client:
        context.load_cert_chain(client.certificate, client.key)
    try:
        return httpx.get(f"https://localhost:{server.http_port}/v2/health/ready", verify=context).status_code == 200
    except httpx.TransportError:
        return False


def by_grpc(server: Server, authority: Authority, client: Signed | None = None) -> bool:
    """Ask the server over gRPC with TLS; return whether it answers."""
    own = (client.key.read_bytes(), client.certificate.read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *own)
    return is_serving(grpc.secure_channel(f"localhost:{server.grpc_port}", credentials))


def is_serving(channel: grpc.Channel) -> bool:
    with channel:
        try:
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status == 1
        except grpc.RpcError:
            return False


BOTH = pytest.mark.parametrize("ask", [by_http, by_grpc])


@BOTH
def test_clients_that_trust_the_authority_are_answered(
    encrypted: Server, authority: Authority, tmp_path: Path, ask: Callable[..., bool]
) -> None:
    assert encrypted.http_url.startswith("https://")
    assert ask(encrypted, authority)
    assert not ask(encrypted, Authority(tmp_path, "another"))


def test_plain_text_is_not_answered(encrypted: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{encrypted.http_port}/v2/health/ready")
    assert not is_serving(grpc.insecure_channel(f"localhost:{encrypted.grpc_port}"))


@BOTH
def test_with_an_authority_of_clients_they_need_its_certificate(
    mutual: Server, authority: Authority, tmp_path: Path, ask: Callable[..., bool]
) -> None:
    assert ask(mutual, authority, authority.sign("client"))
    assert not ask(mutual, authority)
    assert not ask(mutual, authority, Authority(tmp_path, "another").sign("stranger"))
