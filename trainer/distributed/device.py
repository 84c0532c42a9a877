"""Which device is a rank's own, and with whom it shares it."""

from __future__ import annotations

import torch

from trainer.distributed.environment import ClusterEnvironment, launch_hint


def choose_device(device: str, environment: ClusterEnvironment, backend: str = "auto") -> torch.device:
    """The device of this rank: `auto` is the GPU of its local rank if there is one, else the CPU.

    With gloo more ranks than there are GPUs take them in turns. Raises ValueError when a rank cannot have its device.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if (
        visible == 1 and (environment.gpus or 0) >= environment.local_world_size
    ):  # srun shows each of its tasks one of them
        return torch.device("cuda", 0)
    if environment.local_world_size > visible and not (visible and backend == "gloo"):
        fewer = f"{launch_hint(visible)}, or launch.backend=gloo to share them, or " if visible else ""
        raise ValueError(
            f"{launch_hint(environment.local_world_size)}: each rank wants a GPU, but {visible} are visible on this node.\n"
            f"  set {fewer}launch.device=cpu"
        )
    index = environment.local_rank % visible
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def count_ranks_on_device(device: torch.device, environment: ClusterEnvironment) -> int:
    """The ranks that have this rank's GPU, itself among them; a CPU gives each rank threads of its own."""
    visible = torch.cuda.device_count() if device.type == "cuda" else environment.local_world_size
    if visible == 1 and (environment.gpus or 0) >= environment.local_world_size:
        return 1
    return len(range(environment.local_rank % visible, environment.local_world_size, visible))


def check_nccl(key: str, backend: str, device: torch.device) -> None:
    """Raises ValueError when NCCL is wished for by this key, and the rank is on the CPU."""
    if backend == "nccl" and device.type != "cuda":
        raise ValueError(
            f"{key}=nccl, but the ranks are on the CPU: NCCL is for GPUs.\n  set {key}=auto, or launch.device=cuda"
        )
