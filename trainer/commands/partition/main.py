"""`python -m trainer partition`: prints and draws the partition of a run's examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.commands.exit_codes import FINISHED
from trainer.commands.partition.plot import draw
from trainer.commands.plan.target_world import leader_topology, remote_nodes
from trainer.config.build import build_clients
from trainer.config.compose import compose_tree, unused_path
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config, read_config
from trainer.data import Clients, describe
from trainer.distributed.silos import silo_sizes

USAGE = """\
python -m trainer partition [key=value ...] [picture=partition.png]     how the examples are partitioned

Takes the overrides of a run, and trains nothing. Prints a row for each client: its numbers of training, validation and
test examples and, for up to 20 classes, of training examples by label. Draws the labels by clients, and for
partition=clusters the examples in the plane of their first two principal components.

  picture=FILE.png     file of the picture; default: partition.png, or the next free number

Exit codes: 0 finished, 2 bad input."""

PICTURE = "picture="


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code. Raises ValueError for bad input."""
    pictures = [argument.removeprefix(PICTURE) for argument in arguments if argument.startswith(PICTURE)]
    config = read_config(compose_tree([argument for argument in arguments if not argument.startswith(PICTURE)]))
    path = _plot_path(pictures[-1] if pictures else None)
    splits, clients = build_clients(config, leader_topology(0, _sizes(config), torch.device("cpu")))
    print(describe(clients, splits.train, splits.label_names, most=len(clients)))
    print(_summary(clients))
    project = getattr(instantiate("partition", config.partition), "plot_points", None)
    points = project(splits.train, config.seed) if project else None
    draw(clients, splits.train, splits.label_names, points).savefig(path)
    print(f"picture  {path}")
    return FINISHED


def _plot_path(argument: str | None) -> Path:
    """Return the file of the picture, by default one that does not exist yet."""
    path = Path(argument) if argument else unused_path(Path("partition.png"))
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"picture={path}\n  valid: a file name that ends in .png, in an existing folder")
    return path


def _sizes(config: Config) -> tuple[int, ...]:
    """Return the sizes of the silos, by `silos` or by the machines of `launch`."""
    if isinstance(config.silos, int):
        return (1,) * config.silos  # the partition does not depend on the number of ranks
    if isinstance(config.silos, list):
        return tuple(config.silos)
    return silo_sizes(config.silos, remote_nodes(config.launch))


def _summary(clients: Clients) -> str:
    """Return a line on the sizes of the clients."""
    sizes = clients.sizes
    spread = f"{sizes.min():,} to {sizes.max():,}, mean {sizes.mean():,.1f}, deviation {sizes.std():,.1f}"
    return f"clients  {len(clients)}; training examples: {spread}"
