"""Network interfaces of this host, and the one that gloo would use."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import psutil

LOOPBACK = "127."
LOOPBACK_ADDRESS = "127.0.0.1"


class Interface(NamedTuple):
    """A network interface and its IPv4 address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return self.address.startswith(LOOPBACK)


def list_interfaces() -> list[Interface]:
    """Return the interfaces that have an IPv4 address."""
    return [
        Interface(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]


def gloo_interface() -> Interface:
    """Return the interface that gloo would use.

    It is that of GLOO_SOCKET_IFNAME, else of the address of the host's name, else the loopback.

    Raises:
        ValueError: GLOO_SOCKET_IFNAME names an interface that this host does not have.
    """
    interfaces = list_interfaces()
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        for interface in interfaces:
            if interface.name == wanted:
                return interface
        names = ", ".join(interface.name for interface in interfaces)
        raise ValueError(f"GLOO_SOCKET_IFNAME={wanted}: {socket.gethostname()} has none\n  valid on that host: {names}")
    return _interface_of(_host_address(), interfaces)


def interface_towards(host: str | None) -> Interface | None:
    """Return the interface on the route to another host.

    If that is a loopback, the first interface that is not; None if there is none.
    """
    interfaces = list_interfaces()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((host or "", 9))  # chooses a route and sends nothing
            found = _interface_of(udp.getsockname()[0], interfaces)
    except OSError:
        found = Interface("", LOOPBACK)
    if not found.is_loopback:
        return found
    return next((interface for interface in interfaces if not interface.is_loopback), None)


def _host_address() -> str:
    """Return the first address of the host's name on which a socket can be bound."""
    try:
        answers = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return LOOPBACK_ADDRESS
    for *_, address in answers:
        with socket.socket() as candidate:
            try:
                candidate.bind((address[0], 0))
            except OSError:
                continue
            return str(address[0])
    return LOOPBACK_ADDRESS


def _interface_of(address: str, interfaces: list[Interface]) -> Interface:
    names = {interface.address: interface.name for interface in interfaces}
    loopback = next((interface.name for interface in interfaces if interface.is_loopback), "lo")
    return Interface(names.get(address, loopback if address.startswith(LOOPBACK) else "?"), address)
