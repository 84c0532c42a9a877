"""The device of each rank, and the ranks that share a GPU."""

from __future__ import annotations

import torch

from trainer.distributed.environment import ClusterEnvironment, launch_hint


def choose_device(device: str, environment: ClusterEnvironment, backend: str = "auto") -> torch.device:
    """Return the device of this rank.

    Args:
        device: `launch.device`; `auto` is the GPU of the local rank if there is one, else the CPU
        environment: the position of this rank
        backend: `launch.backend`; with gloo, ranks may share GPUs, which they take in turns

    Raises:
        ValueError: there are more ranks than GPUs, and they cannot share them
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if _has_bound_gpus(visible, environment):
        return torch.device("cuda", 0)
    if environment.local_world_size > visible and not (visible and backend == "gloo"):
        fewer = f"{launch_hint(visible)}, or launch.backend=gloo to share them, or " if visible else ""
        raise ValueError(
            f"{launch_hint(environment.local_world_size)}: each rank needs a GPU, "
            f"but {visible} are visible on this node.\n  set {fewer}launch.device=cpu"
        )
    index = environment.local_rank % visible
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def count_ranks_on_device(device: torch.device, environment: ClusterEnvironment) -> int:
    """Return the number of ranks on this rank's GPU, itself included; 1 on the CPU."""
    visible = torch.cuda.device_count() if device.type == "cuda" else environment.local_world_size
    if _has_bound_gpus(visible, environment):
        return 1
    return len(range(environment.local_rank % visible, environment.local_world_size, visible))


def _has_bound_gpus(visible: int, environment: ClusterEnvironment) -> bool:
    """Whether srun has bound a GPU to each of its tasks, which sees that one alone."""
    return visible == 1 and (environment.gpus or 0) >= environment.local_world_size


def check_nccl(key: str, backend: str, device: torch.device) -> None:
    """Check that a backend of NCCL is chosen for GPUs alone.

    Args:
        key: the configuration key of the choice, for the error
        backend: the choice
        device: of this rank

    Raises:
        ValueError: NCCL is chosen, and the rank is on the CPU
    """
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(
            f"{key}=nccl, but the ranks are on the CPU: NCCL is for GPUs.\n  set {key}=auto, or launch.device=cuda"
        )
