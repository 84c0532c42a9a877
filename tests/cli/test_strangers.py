"""A stranger in the same network, who holds no token: it does not stop a run, change it, or execute anything."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.network_namespaces import Host, new_hosts, why_not
from tests.cli.command import Shell, work
from tests.cli.test_launcher import figures

NODE = ("-m", "trainer", "launch.nproc_per_node=1", "launch.threads_per_worker=1", "launch.device=cpu")
RUN = ("rounds=8", "algorithm=fedavg", "silos=2")
MEETING = 29500

# The arguments are the endpoint of the launchers, the store of the ranks, and the file that a victim would make.
STRANGER = """
import base64, json, os, pickle, socket, sys
from datetime import timedelta
from torch.distributed import TCPStore

meeting, store = ((host, int(port)) for host, port in (where.rsplit(":", 1) for where in sys.argv[1:3]))

class Evil:
    def __reduce__(self):
        return os.system, (f"touch {sys.argv[3]}",)

silent = [socket.create_connection(where) for where in (meeting, store) for _ in range(20)]
evil = pickle.dumps(Evil())
for words in (b"GET / HTTP/1.1\\r\\n\\r\\n", evil, bytes(32) + b"\\0\\0\\0\\1" + bytes(65), b"\\xff" * 4096):
    socket.create_connection(meeting).sendall(words)
try:
    talk = TCPStore(*store, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    config = json.dumps([{"value": {"tree": {"_target_": "os.system", "_args_": [f"touch {sys.argv[3]}"]}}}])
    start = talk.get("start").decode().partition(" ")[2]
    for key, value in {"leave": "", "config": config, "beat/0": "0 dead", "code": "[]", "targets": "[]"}.items():
        talk.set(f"{start}/{key}", value)
        talk.set(f"{start}/{key}", talk.get("start").decode())
    for key in ("leave", "changed", "left", "start"):
        talk.set(key, "")
    talk.set("torch.rendezvous.nodes", base64.b64encode(evil).decode())
finally:
    print("attacked", flush=True)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts of a run, and one of a stranger."""
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    with new_hosts(3) as made:
        yield made


def variable(pid: int, name: str) -> str:
    """Return an environment variable of a process."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(v for v in variables if v.startswith(f"{name}=".encode())).partition(b"=")[2].decode()


@pytest.mark.long
def test_a_stranger_changes_nothing_of_a_run_on_several_nodes(
    ranks, hosts: list[Host], shell: Shell, tmp_path: Path
) -> None:
    where = f"launch.rdzv_endpoint={hosts[0].address}:{MEETING}"
    overrides = (*NODE, *RUN, "launch.nodes=2", where, "run_dir=attacked", "round.steps=200")
    nodes = [shell.start(*overrides, inside=host.inside) for host in hosts[:2]]
    while not any("round 1/8" in node.out.read_text() for node in nodes):
        assert all(node.process.poll() is None for node in nodes), [node.err.read_text() for node in nodes]
    pid = shell.worker(rank=0)
    store = f"{variable(pid, 'MASTER_ADDR')}:{variable(pid, 'MASTER_PORT')}"
    made = tmp_path / "executed"
    command = [*hosts[2].inside, sys.executable, "-c", STRANGER, f"{hosts[0].address}:{MEETING}", store, str(made)]
    attack = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert attack.stdout == "attacked\n" and "Traceback" not in attack.stderr, attack.stderr
    assert [node.process.wait(120) for node in nodes] == [0, 0], [node.err.read_text() for node in nodes]
    nodes[0].end()
    message = "".join(node.err.read_text() for node in nodes)
    assert f"refused {hosts[2].address}: it does not hold the token of this run" in message and "restart" not in message
    assert not made.exists()
    logs = "".join(path.read_text() for path in (shell.folder / "attacked/logs").glob("rank-*.log"))
    assert "refused: whoever wrote leave to the store of this run does not hold its token" in logs
    ranks(2).run(work, [*RUN, "run_dir=alone", "round.steps=200"], str(shell.folder))
    assert figures(shell.folder / "attacked") == figures(shell.folder / "alone")


@pytest.mark.long
def test_a_stranger_finds_no_port_of_a_run_on_one_machine(hosts: list[Host], new_shell: Callable[[], Shell]) -> None:
    """The store, gloo's and all other listeners are on its loopback network."""
    shell = new_shell()
    started = shell.start("-m", "trainer", *NODE[3:], "rounds=2000", "run_dir=closed", inside=hosts[0].inside)
    started.wait_for("round    1/2000")
    port = int(variable(shell.worker(rank=0), "MASTER_PORT"))
    tried = f"import socket; print(socket.socket().connect_ex(('{hosts[0].address}', {port})))"
    command = [*hosts[2].inside, sys.executable, "-c", tried]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == f"{errno.ECONNREFUSED}\n"
    net = Path(f"/proc/{hosts[0].network.keeper}/net")
    rows = [line.split() for name in ("tcp", "tcp6") for line in (net / name).read_text().splitlines()[1:]]
    assert {row[1].partition(":")[0] for row in rows if row[3] == "0A"} == {"0100007F"}, "127.0.0.1"
    started.press_control_c()
    assert started.process.wait(30) == 75
