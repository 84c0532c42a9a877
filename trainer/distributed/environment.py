"""The environment of this process, as set by torchrun, SLURM's srun, the trainer's own launcher, or a shell.

Under srun the tasks of a step are the ranks; the tasks of submitit are such tasks. A step of one task, and a batch
script, are no world of ranks: in them `python -m trainer` is a launcher, as in a shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Variables of workers that our launcher has started: its process id, and for rank 0 the descriptor of a socket that
# listens at MASTER_PORT.
LAUNCHER_PID, LISTENER = "SILOTRAIN_LAUNCHER_PID", "SILOTRAIN_LISTENER"
# The process id of the one that has started this command, which stops when that dies: a sweep, or a server.
PARENT_PID = "SILOTRAIN_PARENT_PID"

LauncherName = Literal["shell", "launcher", "torchrun", "srun"]

PORTS = range(20000, 32768)  # below the ephemeral ports of Linux
LAST_STEP = 0xFFFFFFF0  # ids from here on are SLURM's own, of a batch script or an interactive shell


@dataclass(frozen=True)
class ClusterEnvironment:
    """The position of this process in its world; a world of one by default.

    rank              the global rank
    world_size        the number of ranks
    local_rank        the rank on this node
    local_world_size  the number of ranks on this node
    node              the index of this node
    host              of rank 0's store; None in a world of one
    port              of rank 0's store
    launched_by       the program that has started the process
    gpus              the GPUs of this node for all its ranks together, if SLURM has set the number
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    host: str | None = None
    port: int = 0
    launched_by: LauncherName = "shell"
    gpus: int | None = None

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks are on this node."""
        return self.local_world_size == self.world_size


def detect_environment(env: Mapping[str, str] = os.environ) -> ClusterEnvironment:
    """Read the environment variables of torchrun or srun; a world of one without them."""
    if "RANK" in env:
        return _from_torchrun(env)
    return _from_srun(env) if _has_several_tasks(env) else ClusterEnvironment()


def is_worker(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank, and not a launcher. With `launch.nodes=`, the tasks of srun are launchers."""
    with_launchers = any(argument.startswith("launch.nodes=") for argument in arguments)
    return "RANK" in env or (_has_several_tasks(env) and not with_launchers)


def is_main_process(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process reports errors of the launch: one of all that srun or a torchrun has started."""
    return all(env.get(name, "0") == "0" for name in ("SLURM_PROCID", "LOCAL_RANK"))


def check_world(env: Mapping[str, str] = os.environ) -> None:
    """Check that a torchrun inside srun makes one world of all nodes of the step.

    Raises:
        ValueError: several torchruns on a node, or one that does not know of the other nodes
    """
    if not _in_srun_step(env) or "RANK" not in env or detect_environment(env).launched_by == "launcher":
        return
    tasks, nodes = max(_expand_task_counts(env["SLURM_STEP_TASKS_PER_NODE"])), int(env["SLURM_STEP_NUM_NODES"])
    if tasks > 1:
        raise ValueError(
            f"torchrun was started by srun with {tasks} tasks a node: each torchrun starts ranks of its own.\n"
            "  set srun --ntasks-per-node=1 torchrun ...; or leave torchrun out: the tasks are the ranks"
        )
    if nodes > 1 and env.get("GROUP_WORLD_SIZE") == "1":
        raise ValueError(
            f"torchrun knows of 1 node, but srun has started it on {nodes}: each would train alone, in one run folder."
            f"\n  set torchrun --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT ..., "
            f"or python -m trainer launch.nodes={nodes} launch.rdzv_endpoint=HOST:PORT"
        )


def check_launcher(nodes: int | Sequence[int], env: Mapping[str, str] = os.environ) -> None:
    """Check that srun has started one launcher on each node.

    Args:
        nodes: `launch.nodes`: how many, or the smallest and the largest number
        env: the environment variables

    Raises:
        ValueError: several launchers on a node, or another number of nodes
    """
    if not _in_srun_step(env):
        return
    tasks, started = max(_expand_task_counts(env["SLURM_STEP_TASKS_PER_NODE"])), int(env["SLURM_STEP_NUM_NODES"])
    least, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if tasks > 1:
        raise ValueError(
            f"launch.nodes with {tasks} tasks a node: each task would start workers of its own.\n"
            "  start one task a node: srun --ntasks-per-node=1; or leave launch.nodes out: the tasks are the ranks"
        )
    if not least <= started <= most:
        shown = nodes if isinstance(nodes, int) else f"[{least},{most}]"
        raise ValueError(f"launch.nodes={shown}, but srun has started {started} nodes.\n  set launch.nodes={started}")


def check_ranks(environment: ClusterEnvironment, nproc: int | str) -> None:
    """Check that `launch.nproc_per_node` is the number of ranks that srun has started on this node.

    Raises:
        ValueError: it is another number
    """
    if environment.launched_by == "srun" and nproc not in ("auto", environment.local_world_size):
        raise ValueError(
            f"launch.nproc_per_node={nproc}, but srun has started {environment.local_world_size} ranks on this node.\n"
            f"  set srun --ntasks-per-node={nproc}, or leave launch.nproc_per_node out; "
            "with launch.nodes= and one task a node the workers are started by this program"
        )


def launch_hint(ranks: int) -> str:
    """Return the option with which torchrun, srun or the own launcher starts this number of ranks on a node."""
    options = {"torchrun": "torchrun --nproc-per-node {}", "srun": "srun --ntasks-per-node={}"}
    return options.get(detect_environment().launched_by, "launch.nproc_per_node={}").format(ranks)


def was_requeued(env: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM has started this job before, which has then made its run folder itself."""
    return int(env.get("SLURM_RESTART_COUNT", "0")) > 0


def _from_torchrun(env: Mapping[str, str]) -> ClusterEnvironment:
    def read(name: str, default: int) -> int:
        return int(env.get(name, default))

    return ClusterEnvironment(
        rank=read("RANK", 0),
        world_size=read("WORLD_SIZE", 1),
        local_rank=read("LOCAL_RANK", 0),
        local_world_size=read("LOCAL_WORLD_SIZE", 1),
        node=read("GROUP_RANK", 0),
        host=_without_brackets(env.get("MASTER_ADDR")),
        port=read("MASTER_PORT", 0),
        launched_by="launcher" if LAUNCHER_PID in env else "torchrun",
    )


def _from_srun(env: Mapping[str, str]) -> ClusterEnvironment:
    node, job, step = (int(env[name]) for name in ("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = PORTS[(97 * job + step) % len(PORTS)]  # jobs that share a node are often neighbours in time
    return ClusterEnvironment(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=_expand_task_counts(env["SLURM_STEP_TASKS_PER_NODE"])[node],
        node=node,
        host=_without_brackets(env.get("MASTER_ADDR")) or _first_host(env["SLURM_STEP_NODELIST"]),
        port=int(env.get("MASTER_PORT") or port),
        launched_by="srun",
        gpus=int(env["SLURM_GPUS_ON_NODE"]) if "SLURM_GPUS_ON_NODE" in env else None,
    )


def _without_brackets(host: str | None) -> str | None:
    """Return a host; an IPv6 address without the brackets of a URL."""
    return host and host.removeprefix("[").removesuffix("]")


def _in_srun_step(env: Mapping[str, str]) -> bool:
    return int(env.get("SLURM_STEP_ID", LAST_STEP)) < LAST_STEP


def _has_several_tasks(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a SLURM step."""
    return _in_srun_step(env) and int(env["SLURM_STEP_NUM_TASKS"]) > 1


def _expand_task_counts(text: str) -> list[int]:
    """Expand SLURM's 2(x3),1 to [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(hosts: str) -> str:
    """Return the first host of SLURM's list: rack2-n01 of rack[2-4,7]-n[01-16],login."""
    whole = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts)
    assert whole
    return re.sub(r"\[([^]\-,]+)[^]]*\]", r"\1", whole[0])
