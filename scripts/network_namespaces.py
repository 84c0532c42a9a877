"""Hosts on one machine: networks of their own, joined by a switch from which a host can be unplugged."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LINK = "eth0"  # a host's own name for its end of the cable
PROBE = "unshare --net sh -c 'ip link add type bridge && ip link add type veth'"
KEEPER = ("unshare", "--net", "sh", "-c", "echo ready; exec cat")


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    tried = subprocess.run(["sh", "-c", PROBE], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


@dataclass(frozen=True)
class Network:
    """A network namespace, which lasts as long as there are processes in it. It has no name that could be in use."""

    keeper: int  # a process in it

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command, as one that runs in this network."""
        return ("nsenter", f"--net=/proc/{self.keeper}/ns/net", *command)

    def ip(self, arguments: str) -> None:
        """Runs ip(8) in this network."""
        subprocess.run(self.inside("ip", *arguments.split()), check=True)

    def limit(self, device: str, rate: str) -> None:
        """From now on no more than this leaves the device; the rate is tc(8)'s, such as 100mbit."""
        shape = f"qdisc add dev {device} root tbf rate {rate} burst 64kb latency 50ms"
        subprocess.run(self.inside("tc", *shape.split()), check=True)

    def processes(self) -> list[int]:
        """Those in this network, without its keeper."""
        own, found = Path(f"/proc/{self.keeper}/ns/net").readlink(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if (process / "ns/net").readlink() == own and int(process.name) != self.keeper:
                    found.append(int(process.name))
        return found


@dataclass(frozen=True)
class Host:
    """A host with one address, on a port of the switch. A command runs on it that begins with `inside`."""

    number: int
    network: Network
    switch: Network

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number + 1}"  # reserved for examples: it is nobody's

    @property
    def port(self) -> str:
        return f"port{self.number}"

    @property
    def inside(self) -> tuple[str, ...]:
        return self.network.inside("env", f"GLOO_SOCKET_IFNAME={LINK}")

    def attach(self) -> None:
        """Lays the cable between host and switch."""
        self.switch.ip(f"link add {self.port} type veth peer name {LINK} netns {self.network.keeper}")
        self.switch.ip(f"link set {self.port} master switch up")
        self.network.ip("link set lo up")
        self.network.ip(f"address add {self.address}/24 dev {LINK}")
        self.network.ip(f"link set {LINK} up")

    def limit(self, rate: str) -> None:
        """From now on no more than this passes to the host, nor from it."""
        self.switch.limit(self.port, rate)
        self.network.limit(LINK, rate)

    def unplug(self) -> None:
        """From now on nothing comes to this host or from it. The others are not told."""
        self.switch.ip(f"link set {self.port} down")

    def plug(self) -> None:
        """Ends what `unplug` began."""
        self.switch.ip(f"link set {self.port} up")


@contextmanager
def new_network() -> Iterator[Network]:
    """A network with nothing in it; whatever is still running in it at the end of the block is killed."""
    with subprocess.Popen(KEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:  # reads until we end
        assert keeper.stdin and keeper.stdout
        assert keeper.stdout.readline(), "until it has said so, the keeper is in the network of this process"
        network = Network(keeper.pid)
        try:
            yield network
        finally:
            for process in network.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


@contextmanager
def new_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts that reach each other and nobody else, until the block is left."""
    with ExitStack() as stack:
        switch = stack.enter_context(new_network())
        switch.ip("link add switch up type bridge")
        hosts = [Host(number, stack.enter_context(new_network()), switch) for number in range(count)]
        for host in hosts:
            host.attach()
        yield hosts
