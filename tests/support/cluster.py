"""A temporary SLURM cluster on this machine, with real daemons and several nodes.

For SLURM each node is a separate host: it has a name, an address of the loopback network, an /etc/hosts with the
others, and processes that end with it. Nothing outside the cluster's folder is written.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
PACKAGES = "munge slurmctld slurmd slurm-client util-linux"
SECONDS_TO_START = 60
POLL_INTERVAL_SECONDS = 0.1
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child")
# The shell stays as the first process of the node, and reaps orphans.
NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t proc proc /proc && { slurmd -D -N "$1" & wait; }'

CONFIGURATION = """\
ClusterName=silotrain
SlurmctldHost={controller}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout={silence}
MessageTimeout=20
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""
SECONDS_OF_SILENCE = 5  # after which SLURM takes a node to be dead


def why_not() -> str:
    """Return the reason why no cluster can be started; empty if one can."""
    if os.geteuid() != 0:
        return "starting a SLURM cluster needs root"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]:
        return f"{', '.join(missing)} not found: apt-get install {PACKAGES}"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def free_ports(count: int) -> list[int]:
    """Return free ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for unbound in sockets:
            unbound.bind(("", 0))
        return [bound.getsockname()[1] for bound in sockets]


@dataclass
class Node:
    """A host of the cluster, up or down."""

    number: int
    port: int
    cpus: int
    gpus: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return f"127.0.0.{10 + self.number}"

    def configuration(self) -> str:
        """Return the line in slurm.conf. Memory is not managed, and CPUs are not bound: the machine may have fewer."""
        return f"NodeName={self.name} NodeAddr={self.address} Port={self.port} CPUs={self.cpus} Gres=gpu:{self.gpus}"

    def start(self, folder: Path, environment: dict[str, str]) -> None:
        """Switch the node on."""
        (folder / self.name).mkdir(exist_ok=True)
        command = [*NAMESPACES, "sh", "-c", NODE, "sh", self.name, str(folder / "hosts")]
        self.process = _daemon(command, folder / f"{self.name}.out", environment)

    def stop(self) -> None:
        """Switch the node off: all its processes are killed at once."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class Job:
    """A job, as shown by `scontrol show job`."""

    facts: dict[str, str]

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended, and will not be requeued."""
        return self.state in ENDED

    @property
    def code(self) -> int:
        """The exit code of the batch script."""
        return int(self.facts["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.facts["Restarts"])


class Cluster:
    """A running controller and nodes, with the commands of a user."""

    def __init__(self, folder: Path, nodes: Sequence[Node], environment: dict[str, str]):
        self.folder, self.nodes, self.environment = folder, nodes, environment

    def ask(self, *command: str, folder: Path | None = None) -> str:
        """Return the output of a SLURM command, which must succeed."""
        ended = self.run(*command, folder=folder)
        assert ended.returncode == 0, f"{command}: {ended.stderr}\n{self.log()}"
        return ended.stdout.strip()

    def run(self, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in the environment of this cluster."""
        return subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=120)

    def submit(self, *arguments: str, folder: Path) -> str:
        """Submit a job with these arguments of sbatch, and return its id."""
        return self.ask("sbatch", "--parsable", *arguments, folder=folder)

    def job(self, id: str) -> Job:
        """Return a job; `20_3` is a task of an array."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", id)
        return Job(dict(word.split("=", 1) for word in shown.split() if "=" in word))

    def wait_for(self, id: str, condition: Callable[[Job], bool], within_seconds: float = 60) -> Job:
        """Wait until a job meets the condition, and return it."""
        deadline = time.monotonic() + within_seconds
        while not condition(job := self.job(id)):
            assert time.monotonic() < deadline, f"job {id} is {job.facts}\n{self.log()}"
            time.sleep(POLL_INTERVAL_SECONDS)
        return job

    def start_again(self, id: str, within_seconds: float = 60) -> Job:
        """Wait until a job that is being requeued runs again, after three seconds instead of SLURM's two minutes."""
        # Not at once: a node refuses a start in the second in which it ends the one before.
        self.wait_for(id, lambda job: job.state == "PENDING" and job.restarts > 0, within_seconds)
        self.ask("scontrol", "update", f"jobid={id}", "starttime=now+3")
        return self.wait_for(id, lambda job: job.state != "PENDING", within_seconds)

    def log(self) -> str:
        """Return the last lines of the controller's log."""
        return "\n".join((self.folder / "slurmctld.log").read_text().splitlines()[-20:])

    def kill(self, name: str) -> None:
        """Switch off the node of this name."""
        next(node for node in self.nodes if node.name == name).stop()

    def repair(self) -> None:
        """Switch on all nodes, and wait until they are idle."""
        for node in self.nodes:
            if node.process is None:
                node.start(self.folder, self.environment)
        deadline = time.monotonic() + SECONDS_TO_START
        while (states := self.ask("sinfo", "-h", "-p", "normal", "-N", "-o", "%T").split()) != ["idle"] * len(states):
            assert time.monotonic() < deadline, f"the nodes are {states}\n{self.log()}"
            time.sleep(POLL_INTERVAL_SECONDS)


@contextmanager
def new_cluster(gpus: Sequence[int], cpus: int = 8) -> Iterator[Cluster]:
    """Start a cluster with a node for each number of (pretended) GPUs, and end it with the block."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # munge requires that all users can reach its socket
        controller, *ports = free_ports(1 + len(gpus))
        nodes = [Node(number, ports[number - 1], cpus, count) for number, count in enumerate(gpus, start=1)]
        environment = {**os.environ, "PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf")}
        _write(folder, controller, nodes)
        for command in _daemons(folder):
            stack.callback(_end, _daemon(command, folder / f"{command[0]}.out", environment))
        cluster = Cluster(folder, nodes, environment)
        for node in nodes:
            stack.callback(node.stop)
        _await(folder / "munge.socket")
        _await_controller(cluster)
        cluster.repair()
        yield cluster


def _write(folder: Path, port: int, nodes: Sequence[Node]) -> None:
    """Write the configuration files of the daemons."""
    (folder / "state").mkdir()
    (folder / "munge.key").touch(0o400)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    names = "".join(f"{node.address} {node.name}\n" for node in nodes)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{names}")
    devices = [(node, folder / f"gpu{number}") for node in nodes for number in range(node.gpus)]
    for _, device in devices:
        device.touch()
    (folder / "gres.conf").write_text("".join(f"NodeName={n.name} Name=gpu File={device}\n" for n, device in devices))
    written = CONFIGURATION.format(
        controller=socket.gethostname().split(".")[0],
        port=port,
        folder=folder,
        silence=SECONDS_OF_SILENCE,
        nodes="\n".join(node.configuration() for node in nodes),
    )
    (folder / "slurm.conf").write_text(written)


def _daemons(folder: Path) -> list[list[str]]:
    """Return the commands of the cluster's daemons, in the foreground."""
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    options = [f"--{option}={folder / file}" for option, file in files.items()]
    return [["munged", "--foreground", *options], ["slurmctld", "-D", "-i"]]


def _daemon(command: Sequence[str], out: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one, however that ends."""
    bound = ["setpriv", "--pdeathsig", "KILL", *command]
    with out.open("w") as log:
        return subprocess.Popen(
            bound, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await(path: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not made"
        time.sleep(POLL_INTERVAL_SECONDS)


def _await_controller(cluster: Cluster) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while "UP" not in cluster.run("scontrol", "ping").stdout:
        assert time.monotonic() < deadline, (cluster.folder / "slurmctld.out").read_text()
        time.sleep(POLL_INTERVAL_SECONDS)
