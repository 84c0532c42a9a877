"""Two hosts on one machine: networks of their own, joined by a switch, from which a host can be unplugged."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

LINK = "eth0"  # each host's own name of its end of the cable
PROBE = "unshare --net sh -c 'ip link add type bridge && ip link add type veth'"
KEEPER = ("unshare", "--net", "sh", "-c", "echo ready; exec cat")


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    tried = subprocess.run(["sh", "-c", PROBE], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


@dataclass(frozen=True)
class Network:
    """A network that nothing else on this machine is in. It has no name, and ends with the processes in it."""

    keeper: int  # a process in it

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command that runs this one in this network."""
        return ("nsenter", f"--net=/proc/{self.keeper}/ns/net", *command)

    def ip(self, arguments: str) -> None:
        """Runs ip(8) in this network."""
        subprocess.run(self.inside("ip", *arguments.split()), check=True)


@dataclass(frozen=True)
class Host:
    """A host with one address, plugged into a port of the switch."""

    network: Network
    switch: Network
    number: int

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number + 1}"  # of the block that is kept for examples

    @property
    def port(self) -> str:
        return f"port{self.number}"

    def inside(self) -> tuple[str, ...]:
        """What a command begins with that is to run here."""
        return self.network.inside("env", f"GLOO_SOCKET_IFNAME={LINK}")

    def attach(self) -> None:
        """Lays the cable and starts the network."""
        self.switch.ip(f"link add {self.port} type veth peer name {LINK} netns {self.network.keeper}")
        self.switch.ip(f"link set {self.port} master switch up")
        self.network.ip("link set lo up")
        self.network.ip(f"address add {self.address}/24 dev {LINK}")
        self.network.ip(f"link set {LINK} up")

    def unplug(self) -> None:
        """From now on nothing comes to this host or from it, and its link says so."""
        self.switch.ip(f"link set {self.port} down")

    def plug(self) -> None:
        """As it was before it was unplugged."""
        self.switch.ip(f"link set {self.port} up")


@contextmanager
def new_network() -> Iterator[Network]:
    """A network with nothing in it. It lasts until the block is left, or this process has ended, however that went."""
    with subprocess.Popen(KEEPER, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin and keeper.stdout
        assert keeper.stdout.readline() == b"ready\n", "before that it is still in the network of this process"
        yield Network(keeper.pid)
        keeper.stdin.close()  # the keeper reads the end, and ends


@contextmanager
def new_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts that see each other and nobody else, until the block is left."""
    with ExitStack() as stack:
        switch = stack.enter_context(new_network())
        switch.ip("link add switch up type bridge")
        hosts = [Host(stack.enter_context(new_network()), switch, number) for number in range(count)]
        for host in hosts:
            host.attach()
        yield hosts
