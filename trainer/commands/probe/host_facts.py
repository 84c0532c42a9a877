"""What a rank finds on its host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from trainer import __version__
from trainer.commands.probe.network_interfaces import gloo_interface, interface_towards
from trainer.config.schema import Config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.launch.processes import choose_threads

USER_OMP_VARIABLE = "SILOTRAIN_DOCTOR_OMP"  # OMP_NUM_THREADS as it was before our launcher set it
GIB = 2**30


@dataclass(frozen=True)
class HostFacts:
    """One rank's. Sizes are in GiB. Only the first rank of a node has a port, at which the others try to reach it."""

    rank: int
    node: int
    host: str
    interface: str
    address: str
    port: int
    proposed: str  # the interface that leads to the other hosts; empty if there is none
    versions: dict[str, str]
    threads: int
    cores: list[int]
    omp: str  # OMP_NUM_THREADS as the user set it; empty if not
    memory: float
    shm: float
    disk: float
    gpu: str  # name and identity of the rank's own; empty without one
    gpu_memory: float
    has_cuda: bool
    has_nvidia: bool


def collect_host_facts(config: Config, environment: ClusterEnvironment, port: int) -> HostFacts:
    """What this rank has. Raises ValueError if gloo is told of an interface that is not there."""
    gloo, proposed = gloo_interface(), interface_towards(environment.host)
    gpu, gpu_memory = _gpu(config, environment)
    return HostFacts(
        rank=environment.rank,
        node=environment.node,
        host=socket.gethostname(),
        interface=gloo.name,
        address=gloo.address,
        port=port,
        proposed=proposed.name if proposed else "",
        versions=_versions(),
        threads=choose_threads(config.launch.threads_per_worker, environment.local_world_size),
        cores=sorted(os.sched_getaffinity(0)),
        omp=os.environ.get(USER_OMP_VARIABLE, "") if environment.launched_by == "launcher" else "",
        memory=_available_memory(),
        shm=_free(Path("/dev/shm")),
        disk=_free(Path(str(config.run_dir))),
        gpu=gpu,
        gpu_memory=gpu_memory,
        has_cuda=torch.cuda.is_available(),
        has_nvidia=Path("/dev/nvidia0").exists(),
    )


def _versions() -> dict[str, str]:
    of_nccl: Any = nccl.version() if torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, of_nccl)) or "none",
        "hydra": importlib.metadata.version("hydra-core"),
        "silotrain": __version__,
    }


def _available_memory() -> float:
    """That the kernel would give, in GiB, or that is left to this process's group, if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free / GIB


def _free(path: Path) -> float:
    """The free space, in GiB, where this path is or would be."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free / GIB


def _gpu(config: Config, environment: ClusterEnvironment) -> tuple[str, float]:
    """The name and identity of the GPU of this rank and its free memory in GiB."""
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        return "", 0.0
    index = environment.local_rank % torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} {properties.uuid}", torch.cuda.mem_get_info(index)[0] / GIB
