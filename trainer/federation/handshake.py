"""Why a member does not reach the coordinator: its name, its port and TLS are tried, one after the other.

gRPC gives one reason for all that can go wrong on the way: unavailable. So the same way is gone by a plain socket and
Python's ssl.
"""

from __future__ import annotations

import os
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass_environment  # pyright: ignore[reportAttributeAccessIssue]

from cryptography import x509

from trainer.federation.certificates import AUTHORITY
from trainer.federation.link import COORDINATOR

TIMEOUT_SECONDS = 5.0  # of each step
PROXIES, EXCEPTIONS = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")  # as gRPC reads them
SETTINGS_FRAME = b"\4"  # with which a server of HTTP/2 begins: the fourth byte
# OpenSSL's codes of a certificate that is not accepted.
NOT_YET_VALID, EXPIRED, OTHER_NAME = 9, 10, 62
START = "start the coordinator there, or set site.server=HOST:PORT to its address"


class Endpoint(NamedTuple):
    """Where the coordinator listens, and the proxy on the way: host, port and headers."""

    host: str
    port: int
    proxy: tuple[str, int, dict[str, str]] | None

    def __str__(self) -> str:
        through = f" through the proxy {self.proxy[0]}:{self.proxy[1]}" if self.proxy else ""
        return f"{self.host}:{self.port}{through}"


def shake_hands(host: str, port: int, certificates: Path, name: str) -> str:
    """Shake hands with the coordinator as a member, and hang up.

    Args:
        host: of the coordinator.
        port: of the coordinator.
        certificates: the folder of the certificates.
        name: of the member.

    Returns:
        The way, and the version of TLS.

    Raises:
        ValueError: it did not come to that: why, and the remedy in a line of its own.
    """
    endpoint = Endpoint(host, port, _proxy(host))
    context = ssl.create_default_context(cafile=certificates / f"{AUTHORITY}.pem")
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(endpoint) as connection, context.wrap_socket(connection, server_hostname=COORDINATOR) as secure:
            version = secure.version()
            begins = _first_bytes(secure)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(_certificate_reason(endpoint, error)) from error
    except OSError as error:  # ssl's errors too
        raise ValueError(_no_tls_reason(endpoint, error)) from error
    if begins == b"":
        raise ValueError(_refusal_reason(endpoint, certificates, name))
    if begins is None or begins[3:4] != SETTINGS_FRAME:
        raise ValueError(f"{endpoint} speaks TLS, but not gRPC: another program has this port\n  {START}")
    return f"{endpoint}, {version}"


def _proxy(host: str) -> tuple[str, int, dict[str, str]] | None:
    """Return the proxy that gRPC would use by the environment; None: it dials the host itself."""
    address = next(filter(None, map(os.environ.get, PROXIES)), "")
    exceptions = next(filter(None, map(os.environ.get, EXCEPTIONS)), "")
    if not address or proxy_bypass_environment(host, {"no": exceptions}):
        return None
    parsed = urlsplit(address if "://" in address else f"http://{address}")
    user = f"{unquote(parsed.username)}:{unquote(parsed.password or '')}" if parsed.username else ""
    headers = {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}
    return str(parsed.hostname), parsed.port or 80, headers


@contextmanager
def _connected(endpoint: Endpoint) -> Iterator[socket.socket]:
    """Connect to the coordinator.

    Raises:
        ValueError: nothing answers; says why.
    """
    try:
        connection = _dial_proxy(endpoint) if endpoint.proxy else _dial(endpoint)
    except socket.gaierror as error:
        host = endpoint.proxy[0] if endpoint.proxy else endpoint.host
        raise ValueError(
            f"the name {host} has no address here: {error.strerror}\n"
            "  correct the name, ask for it in the DNS, or give the address in its place"
        ) from error
    with connection:
        yield connection


def _dial(endpoint: Endpoint) -> socket.socket:
    socket.getaddrinfo(endpoint.host, endpoint.port)  # its error is of the name alone
    try:
        return socket.create_connection((endpoint.host, endpoint.port), TIMEOUT_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"{endpoint} does not answer within {TIMEOUT_SECONDS:g} s: a firewall on the way drops what is sent there\n"
            f"  ask for outgoing TCP to port {endpoint.port} here, and for incoming TCP at the coordinator's"
        ) from error
    except ConnectionRefusedError as error:
        raise ValueError(f"nothing listens at {endpoint}, or a firewall refuses the way to it\n  {START}") from error
    except OSError as error:
        raise ValueError(
            f"{endpoint} cannot be reached: {error.strerror or error}\n"
            "  correct the address, or ask for a route and an open port"
        ) from error


def _dial_proxy(endpoint: Endpoint) -> socket.socket:
    """Connect through the proxy, as gRPC does, by CONNECT."""
    assert endpoint.proxy
    host, port, headers = endpoint.proxy
    tunnel = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    tunnel.set_tunnel(endpoint.host, endpoint.port, headers)
    try:
        tunnel.connect()
    except socket.gaierror:
        raise
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"{endpoint} cannot be reached: {error}\n"
            f"  let the proxy pass CONNECT to that port, or go without it: no_grpc_proxy={endpoint.host}"
        ) from error
    return tunnel.sock


def _first_bytes(secure: ssl.SSLSocket) -> bytes | None:
    """Return what the other side sends first: empty, if it hangs up; None, if it sends nothing for a while."""
    try:
        return secure.recv(64)
    except TimeoutError:
        return None
    except OSError:
        return b""


def _certificate_reason(endpoint: Endpoint, error: ssl.SSLCertVerificationError) -> str:
    """Say why the certificate of the other side is not accepted."""
    theirs = _their_certificate(endpoint)
    subject = theirs.subject.rfc4514_string() if theirs else "unknown"
    renew = f"renew it: python -m trainer certify ... {COORDINATOR} --renew, and start the coordinator with it"
    if theirs and error.verify_code == EXPIRED:
        return (
            f"the certificate at {endpoint} expired on {theirs.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, by this clock\n"
            f"  {renew}; or set this clock, if it is wrong"
        )
    if theirs and error.verify_code == NOT_YET_VALID:
        return (
            f"the certificate at {endpoint} is valid from {theirs.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, by this "
            f"clock not yet\n  set this clock, or that of the authority; then {renew}"
        )
    if error.verify_code == OTHER_NAME:
        return (
            f"the certificate at {endpoint} is that of {subject.removeprefix('CN=')}, which is not {COORDINATOR}: "
            f"another program of the federation\n  {START}"
        )
    issuer = theirs.issuer.rfc4514_string() if theirs else "unknown"
    return (
        f"the certificate at {endpoint} ({subject}) is signed by another authority ({issuer}) than {AUTHORITY}.pem: "
        f"{error.verify_message}\n"
        f"  use the {AUTHORITY}.pem of the coordinator; if the authority is that of a firewall, which reads TLS, ask "
        "it to let this connection through unread"
    )


def _their_certificate(endpoint: Endpoint) -> x509.Certificate | None:
    """Return the certificate that the other side shows, unverified, to describe it; None if it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(endpoint) as connection, context.wrap_socket(connection) as secure:
            return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _no_tls_reason(endpoint: Endpoint, error: OSError) -> str:
    """Say why there was no handshake."""
    if isinstance(error, TimeoutError):
        found = f"takes connections, and does not answer a TLS handshake within {TIMEOUT_SECONDS:g} s"
    elif isinstance(error, ssl.SSLEOFError | ConnectionError):
        found = "takes connections, and hangs up in the TLS handshake"
    elif isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        found = "answers in plain text"
    else:
        found = f"does not shake hands: {error}"
    return f"{endpoint} {found}: another program has this port, or a firewall cuts TLS off\n  {START}"


def _refusal_reason(endpoint: Endpoint, certificates: Path, name: str) -> str:
    """Say why a coordinator hangs up after the handshake: it has seen the certificate by then, and gives no reason."""
    certificate = x509.load_pem_x509_certificate((certificates / f"{name}.pem").read_bytes())
    dates = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}"
    return (
        f"{endpoint} is the coordinator, and refuses the certificate of {name}: it is valid from {dates} UTC, and not "
        f"by the coordinator's clock; or it is signed by another authority than the coordinator's {AUTHORITY}.pem\n"
        "  set both clocks, and use the files of one authority"
    )
