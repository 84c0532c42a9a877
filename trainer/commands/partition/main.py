"""`python -m trainer partition`: deals the examples as a run would, prints the table, draws the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.commands.partition.plot import draw
from trainer.commands.plan.target_world import leader_topology
from trainer.commands.train.launcher import FINISHED
from trainer.config.build import build_clients
from trainer.config.compose import compose_tree, unused_path
from trainer.config.schema import Config, read_config
from trainer.data import Clients, describe
from trainer.distributed.launch.processes import choose_nproc
from trainer.distributed.topology import silo_sizes

USAGE = """\
python -m trainer partition [key=value ...] [picture=partition.png]     who would get which examples

With the run's own overrides: nothing is started or trained. Prints a row a client, with its examples to train, validate
and test and, of up to 20 classes, the labels of those to train; and draws them, labels by clients.

  picture=FILE.png     where the picture goes; without it: partition.png here, or the next number that is free

Exit codes: 0 told, 2 bad input."""

PICTURE = "picture="


def main(arguments: Sequence[str]) -> int:
    """The exit code. Raises ValueError for bad input."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return FINISHED
    told = [argument.removeprefix(PICTURE) for argument in arguments if argument.startswith(PICTURE)]
    config = read_config(compose_tree([argument for argument in arguments if not argument.startswith(PICTURE)]))
    path = _plot_path(told[-1] if told else None)
    splits, clients = build_clients(config, leader_topology(0, _sizes(config), torch.device("cpu")))
    print(describe(clients, splits.train, splits.label_names, most=len(clients)))
    print(_summary(clients))
    draw(clients, splits.train.labels, splits.label_names).save(path)
    print(f"picture  {path}")
    return FINISHED


def _plot_path(argument: str | None) -> Path:
    """Where the picture goes; what is there already is kept unless it is named."""
    path = Path(argument) if argument else unused_path(Path("partition.png"))
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"picture={path}\n  valid: a file whose name ends with .png, in a folder that is there")
    return path


def _sizes(config: Config) -> tuple[int, ...]:
    """Those of the run's silos, if it is told how many there are; else of the machines that it is told of."""
    if isinstance(config.silos, int):
        return (1,) * config.silos  # who is dealt what does not depend on how many ranks they have
    if isinstance(config.silos, list):
        return tuple(config.silos)
    launch = config.launch
    nodes = launch.nodes if isinstance(launch.nodes, int) else launch.nodes[1]
    ranks = choose_nproc(launch.nproc_per_node, launch.device)
    return silo_sizes(config.silos, [node for node in range(nodes) for _ in range(ranks)])


def _summary(clients: Clients) -> str:
    """How unequal the clients' sizes are."""
    sizes = clients.sizes
    spread = f"{sizes.min():,} to {sizes.max():,}, mean {sizes.mean():,.1f}, deviation {sizes.std():,.1f}"
    return f"clients  {len(clients)}; examples to train: {spread}"
