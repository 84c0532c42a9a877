"""Simulated hosts: network namespaces that are joined by a switch, from which a host can be unplugged."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LINK = "eth0"  # the name of a host's network interface
PROBE = "unshare --net sh -c 'ip link add type bridge && ip link add type veth'"
LIBRARY = ctypes.CDLL(None, use_errno=True)
KEEPER = ("unshare", "--net", "sh", "-c", "echo ready; exec cat")


def why_not() -> str:
    """Return the reason why hosts cannot be made here; empty if they can."""
    tried = subprocess.run(["sh", "-c", PROBE], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


@dataclass(frozen=True)
class Network:
    """A network namespace without a name, which lasts as long as it has processes."""

    keeper: int  # the id of a process in it

    def inside(self, *command: str) -> tuple[str, ...]:
        """Return the command that runs a command in this network."""
        return ("nsenter", f"--net=/proc/{self.keeper}/ns/net", *command)

    def enter(self) -> None:
        """Move this process, which has one thread, into this network."""
        with open(f"/proc/{self.keeper}/ns/net") as namespace:
            if LIBRARY.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")

    def ip(self, arguments: str) -> None:
        """Configure this network with the command `ip`."""
        subprocess.run(self.inside("ip", *arguments.split()), check=True)

    def limit(self, device: str, rate: str) -> None:
        """Limit the rate at which data leaves the device; the rate is in the notation of tc(8), such as 100mbit."""
        shape = f"qdisc add dev {device} root tbf rate {rate} burst 64kb latency 50ms"
        subprocess.run(self.inside("tc", *shape.split()), check=True)

    def processes(self) -> list[int]:
        """Return the processes in this network, except its keeper."""
        own, found = Path(f"/proc/{self.keeper}/ns/net").readlink(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended
                if (process / "ns/net").readlink() == own and int(process.name) != self.keeper:
                    found.append(int(process.name))
        return found


@dataclass(frozen=True)
class Host:
    """A host with one address, on a port of the switch. A command that begins with `inside` runs on it."""

    number: int
    network: Network
    switch: Network

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number + 1}"  # an address range reserved for documentation

    @property
    def port(self) -> str:
        return f"port{self.number}"

    @property
    def inside(self) -> tuple[str, ...]:
        return self.network.inside("env", f"GLOO_SOCKET_IFNAME={LINK}")

    def attach(self) -> None:
        """Connect the host to the switch."""
        self.switch.ip(f"link add {self.port} type veth peer name {LINK} netns {self.network.keeper}")
        self.switch.ip(f"link set {self.port} master switch up")
        self.network.ip("link set lo up")
        self.network.ip(f"address add {self.address}/24 dev {LINK}")
        self.network.ip(f"link set {LINK} up")

    def limit(self, rate: str) -> None:
        """Limit the rate of the data that the host sends, and of that which it receives."""
        self.switch.limit(self.port, rate)
        self.network.limit(LINK, rate)

    def unplug(self) -> None:
        """Drop everything that the host sends or receives; the other hosts are not notified."""
        self.switch.ip(f"link set {self.port} down")

    def plug(self) -> None:
        """Undo `unplug`."""
        self.switch.ip(f"link set {self.port} up")


@contextmanager
def new_network() -> Iterator[Network]:
    """Make an empty network, and kill the processes in it when the block is left."""
    with subprocess.Popen(KEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:  # ends with this process
        assert keeper.stdin and keeper.stdout
        assert keeper.stdout.readline(), "until this line has come, the keeper is in the network of this process"
        network = Network(keeper.pid)
        try:
            yield network
        finally:
            for process in network.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


@contextmanager
def new_hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts that reach only each other, until the block is left."""
    with ExitStack() as stack:
        switch = stack.enter_context(new_network())
        switch.ip("link add switch up type bridge")
        hosts = [Host(number, stack.enter_context(new_network()), switch) for number in range(count)]
        for host in hosts:
            host.attach()
        yield hosts
