"""Where this process stands, read from what started it: torchrun, SLURM's srun, our own launcher, or a shell.

Under srun the tasks of a step are the ranks; those of submitit are such tasks. A step of one task, and a batch script,
make no world: there `python -m trainer` is a launcher, as anywhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LauncherName = Literal["shell", "launcher", "torchrun", "srun"]

PORTS = range(20000, 32768)  # below those that an operating system gives to whoever asks for any
LAST_STEP = 0xFFFFFFF0  # ids from here on are SLURM's own: of a batch script, of an interactive shell


@dataclass(frozen=True)
class ClusterEnvironment:
    """What this process was told: its global rank, its rank on this node, the node's index, where rank 0 is met.

    gpus  of this node for all its ranks together, if SLURM has said so
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


def detect_environment(env: Mapping[str, str] = os.environ) -> ClusterEnvironment:
    """The ClusterEnvironment that these environment variables describe; a world of one without them."""
    if "RANK" in env:
        return _from_torchrun(env)
    return _from_srun(env) if _has_several_tasks(env) else ClusterEnvironment()


def is_worker(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one rank of a world; else it is alone, or a launcher: on each node with launch.nodes."""
    by_launchers = any(argument.startswith("launch.nodes=") for argument in arguments)
    return "RANK" in env or (_has_several_tasks(env) and not by_launchers)


def is_main_process(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what is wrong with the world: one of all that srun or a torchrun started."""
    return all(env.get(name, "0") == "0" for name in ("SLURM_PROCID", "LOCAL_RANK"))


def check_world(env: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError if torchrun inside srun makes other worlds than one over all nodes of the step."""
    if not _in_srun_step(env) or "RANK" not in env or detect_environment(env).launched_by == "launcher":
        return
    tasks, nodes = max(_expand_task_counts(env["SLURM_STEP_TASKS_PER_NODE"])), int(env["SLURM_STEP_NUM_NODES"])
    if tasks > 1:
        raise ValueError(
            f"torchrun was started by srun with {tasks} tasks a node: each torchrun starts ranks of its own.\n"
            "  mix them so: srun --ntasks-per-node=1 torchrun ...; or leave torchrun out: the tasks are the ranks"
        )
    if nodes > 1 and env.get("GROUP_WORLD_SIZE") == "1":
        raise ValueError(
            f"torchrun knows of 1 node, and srun has started it on {nodes}: each would train alone, in one run folder."
            f"\n  say torchrun --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT ..., "
            f"or python -m trainer launch.nodes={nodes} launch.rdzv_endpoint=HOST:PORT"
        )


def check_launcher(nodes: int | Sequence[int], env: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError if srun has not started one launcher on each of so many nodes, or from least to most."""
    if not _in_srun_step(env):
        return
    tasks, there = max(_expand_task_counts(env["SLURM_STEP_TASKS_PER_NODE"])), int(env["SLURM_STEP_NUM_NODES"])
    least, most = (nodes, nodes) if isinstance(nodes, int) else nodes
    if tasks > 1:
        raise ValueError(
            f"launch.nodes with {tasks} tasks a node: each task would start workers of its own.\n"
            "  start one task a node: srun --ntasks-per-node=1; or leave launch.nodes out: the tasks are the ranks"
        )
    if not least <= there <= most:
        said = nodes if isinstance(nodes, int) else f"[{least},{most}]"
        raise ValueError(f"launch.nodes={said}, and srun has started this on {there}.\n  set launch.nodes={there}")


def check_ranks(environment: ClusterEnvironment, nproc: int | str) -> None:
    """Raises ValueError if launch.nproc_per_node is another number of ranks than srun has started on this node."""
    if environment.launched_by == "srun" and nproc not in ("auto", environment.local_world_size):
        raise ValueError(
            f"launch.nproc_per_node={nproc}, and srun has started {environment.local_world_size} ranks on this node.\n"
            f"  set srun --ntasks-per-node={nproc}, or leave launch.nproc_per_node out; "
            "with launch.nodes= and one task a node the workers are started by this program"
        )


def launch_hint(ranks: int) -> str:
    """How one tells whoever starts the ranks, torchrun, srun or our own launcher, to start so many on a node."""
    ways = {"torchrun": "torchrun --nproc-per-node {}", "srun": "srun --ntasks-per-node={}"}
    return ways.get(detect_environment().launched_by, "launch.nproc_per_node={}").format(ranks)


def was_requeued(env: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM has started this job before: what is in its run folder is its own."""
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
        host=env.get("MASTER_ADDR"),
        port=read("MASTER_PORT", 0),
        launched_by="launcher" if "SILOTRAIN_RESTART" in env else "torchrun",
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
        host=env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
        port=int(env.get("MASTER_PORT") or port),
        launched_by="srun",
        gpus=int(env["SLURM_GPUS_ON_NODE"]) if "SLURM_GPUS_ON_NODE" in env else None,
    )


def _in_srun_step(env: Mapping[str, str]) -> bool:
    return int(env.get("SLURM_STEP_ID", LAST_STEP)) < LAST_STEP


def _has_several_tasks(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of a step."""
    return _in_srun_step(env) and int(env["SLURM_STEP_NUM_TASKS"]) > 1


def _expand_task_counts(text: str) -> list[int]:
    """The numbers that SLURM writes as 2(x3),1: 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _first_host(hosts: str) -> str:
    """The first of the hosts that SLURM writes as rack[2-4,7]-n[01-16],login: rack2-n01."""
    whole = re.match(r"(?:[^,\[]|\[[^]]*\])*", hosts)
    assert whole
    return re.sub(r"\[([^]\-,]+)[^]]*\]", r"\1", whole[0])
