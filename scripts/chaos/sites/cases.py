"""The federations to disturb: a coordinator, and sites with data of their own, one of them with two ranks."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.compose import compose_tree
from trainer.federation.certificates import certify

COORDINATOR, CERTIFICATES = "coordinator", "certificates"
EXAMPLES = {"berlin": 300, "paris": 500, "rome": 200}

# A round takes some tenths of a second, with mid-round checkpoints in it. A site that does not reach the coordinator
# for some seconds saves and leaves, and is started again.
COMMON = (
    "data=npz",
    "data.classes=10",
    "model=custom",
    "model._target_=scripts.chaos.cases.Noisy",
    "+model.width=128",
    "optimizer=momentum",
    "optimizer.lr=0.02",
    "schedule=cosine",
    "batch_size=16",
    "round.steps=25",
    "checkpoint.every_seconds=0.3",
    "launch.threads_per_worker=1",
    "launch.device=cpu",
    "launch.max_restarts=100000",
    "site.grace_seconds=null",
    "site.retry_seconds=4",
)


@dataclass(frozen=True)
class Federation:
    """The overrides of its members.

    Attributes:
        sites: their names, and the number of ranks of each.
        overrides: of all members.
    """

    sites: Mapping[str, int]
    overrides: tuple[str, ...]


TWO = {"berlin": 1, "paris": 2}
THREE = {"berlin": 1, "paris": 2, "rome": 1}

CASES = {
    "fedavg": Federation(TWO, ("algorithm=fedavg",)),
    "adam": Federation(THREE, ("algorithm=fedavg", "server=adam")),
    "scaffold": Federation(TWO, ("algorithm=scaffold",)),
    "topk": Federation(TWO, ("algorithm=fedavg", "update_compression=topk")),
    "personal": Federation(THREE, ("algorithm=fedavg", "algorithm.shared_params=layers.1")),
}


def write_files(folder: Path, sites: Iterable[str]) -> None:
    """Write certificates, and a file of images for each site, of other sizes and labels."""
    certify(folder / CERTIFICATES, [COORDINATOR, *sites])
    for number, name in enumerate(sites):
        random = np.random.default_rng(number)
        labels = random.choice(10, EXAMPLES[name], p=random.dirichlet(np.ones(10)))
        patterns = np.eye(10)[labels].repeat(7, axis=1)[:, :64]
        images = (patterns + random.normal(size=patterns.shape)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=images.reshape(-1, 1, 8, 8), y=labels)


def trees(
    overrides: Iterable[str], sites: Mapping[str, int], files: Path, folder: Path, host: str
) -> dict[str, dict[str, Any]]:
    """Return the configuration of each member, the coordinator first.

    Args:
        overrides: of all of them.
        sites: their names, and the number of ranks of each.
        files: the folder that `write_files` wrote.
        folder: has a run folder for each.
        host: the address of the coordinator.
    """
    address = f"{host}:{_free_port()}"
    members = f"site.members=[{','.join(sites)}]"
    own = {COORDINATOR: [f"site.listen={address}", members, "data.path=null", "launch.nproc_per_node=1"]}
    for name, ranks in sites.items():
        there = [f"site.server={address}", f"data.path={files / name}.npz", f"launch.nproc_per_node={ranks}"]
        own[name] = [f"site.name={name}", *there]
    common = [*overrides, f"site.certificates={files / CERTIFICATES}"]
    return {name: compose_tree([*common, *each, f"run_dir={folder / name}"]) for name, each in own.items()}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
