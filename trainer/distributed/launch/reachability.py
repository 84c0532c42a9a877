"""Checks of hosts and ports: is it this machine, can it be reached? And sockets that listen."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

CONNECT_TIMEOUT_SECONDS = 1  # of one attempt
POLL_INTERVAL_SECONDS = 0.05
BACKLOG = 1024  # connections that wait until the process that accepts them has begun

LOOPBACK = "127.0.0.1"


def parse_endpoint(endpoint: str | None) -> tuple[str, int]:
    """Return host and port of `launch.rdzv_endpoint`; an IPv6 address may be in brackets.

    Raises:
        ValueError: it is not host:port
    """
    host, _, port = (endpoint or "").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"launch.rdzv_endpoint={endpoint or 'null'}\n"
            "  valid: host:port of one of the nodes, the same on all of them; an IPv6 address as [::1]:29500"
        )
    return host, int(port)


def listen(port: int = 0, host: str | None = None) -> socket.socket:
    """Return a socket that listens at a port of this machine; 0: a free one. By default other machines may connect."""
    if host:
        return socket.create_server((host, port), backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def is_local_host(host: str) -> bool:
    """Return whether a host is this machine: a socket can be bound to its address.

    Raises:
        ValueError: there is no such host.
    """
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(
            f"launch.rdzv_endpoint: host {host} not found: {error.strerror}\n  valid: host:port of one of the nodes"
        ) from error
    with socket.socket(address[0], socket.SOCK_STREAM) as candidate:
        try:
            candidate.bind((address[4][0], 0))
        except OSError:
            return False
    return True


def connection_error(
    host: str, port: int, timeout_seconds: float, stop_requested: Callable[[], object] = lambda: False
) -> str:
    """Try to connect until something listens, and return why nothing does, or empty.

    Args:
        host: name or address.
        port: TCP port.
        timeout_seconds: time until it gives up.
        stop_requested: whether to give up now.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_SECONDS).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline or stop_requested():
                return error.strerror or str(error)
        time.sleep(POLL_INTERVAL_SECONDS)
