"""The network of this host as gloo would choose from it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import NamedTuple

SIOCGIFADDR = 0x8915  # of Linux's ioctl: an interface's address
LOOPBACK = "127."


class Interface(NamedTuple):
    """A network interface and its IPv4 address."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return self.address.startswith(LOOPBACK)


def list_interfaces() -> list[Interface]:
    """Those of this host that have an IPv4 address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found.append(Interface(name, socket.inet_ntoa(answer[20:24])))
    return found


def gloo_interface() -> Interface:
    """What gloo would use: GLOO_SOCKET_IFNAME, else what the host's name resolves to, else the loopback.

    Raises ValueError when there is no such interface.
    """
    there = list_interfaces()
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        for interface in there:
            if interface.name == wanted:
                return interface
        names = ", ".join(interface.name for interface in there)
        raise ValueError(f"GLOO_SOCKET_IFNAME={wanted}: {socket.gethostname()} has none\n  valid there: {names}")
    return _named(_own_address(), there)


def interface_towards(host: str | None) -> Interface | None:
    """The interface over which this host reaches the other one, or is reached as it; None if over none but loopback."""
    there = list_interfaces()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.connect((host or "", 9))  # sends nothing
            found = _named(asked.getsockname()[0], there)
    except OSError:
        found = Interface("", LOOPBACK)
    if not found.is_loopback:
        return found
    return next((interface for interface in there if not interface.is_loopback), None)


def _own_address() -> str:
    """The first address of this host's name that it can listen at."""
    try:
        answers = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1"
    for *_, address in answers:
        with socket.socket() as tried:
            try:
                tried.bind((address[0], 0))
            except OSError:
                continue
            return str(address[0])
    return "127.0.0.1"


def _named(address: str, there: list[Interface]) -> Interface:
    loopback = next((interface.name for interface in there if interface.is_loopback), "lo")
    known = {interface.address: interface.name for interface in there}
    return Interface(known.get(address, loopback if address.startswith(LOOPBACK) else "?"), address)


def is_local_host(host: str) -> bool:
    """Whether the name or address is one of this machine, or is none that anybody has."""
    try:
        addresses = {answer[4][0] for answer in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return True  # whoever uses it says so
    own = {interface.address for interface in list_interfaces()}
    return any(address in own or str(address).startswith(LOOPBACK) for address in addresses)
