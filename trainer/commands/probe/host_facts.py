"""Facts about a rank and its host: network, versions, cores, memory, disk, GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.cuda import nccl

from trainer import __version__
from trainer.commands.probe.network import gloo_interface, interface_towards
from trainer.config.schema import Config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.launch.processes import choose_threads

USER_OMP_VARIABLE = "SILOTRAIN_DOCTOR_OMP"  # holds OMP_NUM_THREADS as it was before the launcher set it
GIB = 2**30


@dataclass(frozen=True)
class HostFacts:
    """Facts about one rank. Sizes are in GiB.

    Attributes:
        interface: that gloo would use, and `address` its address.
        port: at which the first rank of a node answers pings; 0 for the other ranks.
        proposed: interface that leads to the other hosts; empty if there is none.
        omp: OMP_NUM_THREADS as the user set it; empty if not.
        memory: available; `shm` and `disk` are free in /dev/shm and where `run_dir` is.
        gpu: name and UUID of the rank's GPU; empty without one.
    """

    rank: int
    node: int
    host: str
    interface: str
    address: str
    port: int
    proposed: str
    versions: dict[str, str]
    threads: int
    cores: list[int]
    omp: str
    memory: float
    shm: float
    disk: float
    gpu: str
    gpu_memory: float
    has_cuda: bool
    has_nvidia: bool


def collect_host_facts(config: Config, environment: ClusterEnvironment, port: int) -> HostFacts:
    """Collect the facts about this rank, whose node answers pings at `port`.

    Raises:
        ValueError: GLOO_SOCKET_IFNAME names an interface that this host does not have.
    """
    interface = gloo_interface()
    gpu, gpu_memory = _gpu(config, environment)
    return HostFacts(
        rank=environment.rank,
        node=environment.node,
        host=socket.gethostname(),
        interface=interface.name,
        address=interface.address,
        port=port,
        proposed=interface_towards(environment.host),
        versions=_versions(),
        threads=choose_threads(config.launch.threads_per_worker, environment.local_world_size),
        cores=sorted(os.sched_getaffinity(0)),
        omp=os.environ.get(USER_OMP_VARIABLE, "") if environment.launched_by == "launcher" else "",
        memory=_available_memory(),
        shm=_free_space(Path("/dev/shm")),
        disk=_free_space(Path(str(config.run_dir))),
        gpu=gpu,
        gpu_memory=gpu_memory,
        has_cuda=torch.cuda.is_available(),
        has_nvidia=Path("/dev/nvidia0").exists(),
    )


def _versions() -> dict[str, str]:
    nccl_version: Any = nccl.version() if torch.cuda.is_available() else ()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "NCCL": ".".join(map(str, nccl_version)) or "none",
        "hydra": importlib.metadata.version("hydra-core"),
        "silotrain": __version__,
    }


def _available_memory() -> float:
    """Return the memory available on the host or in the control group, in GiB."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available / GIB


def _free_space(path: Path) -> float:
    """Return the free space of the file system where this path is or would be, in GiB."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return psutil.disk_usage(str(existing)).free / GIB


def _gpu(config: Config, environment: ClusterEnvironment) -> tuple[str, float]:
    """Return the name and UUID of this rank's GPU, and its free memory in GiB."""
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        return "", 0.0
    index = environment.local_rank % torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} {properties.uuid}", torch.cuda.mem_get_info(index)[0] / GIB
