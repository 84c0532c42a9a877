"""Figures of a model on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column
from rich.text import Text

from trainer.commands.evaluate.evaluation import Evaluation
from trainer.loggers.messages import number
from trainer.utils.tables import make_table

SETS = ("test", "validation", "global", "personal")
LABEL_WIDTH = 10
MAX_CLIENTS = 20  # that are shown


def show(title: str, found: Evaluation, console: Console) -> None:
    """Print the figures of each set of examples, and those of single clients if there are any."""
    counts = ", ".join(f"{count:,} of {name}" for name, count in found.examples.items() if count)
    for label, text in (("model", title), ("workers", found.ranks), ("examples", counts)):
        console.print(Text.assemble((label.ljust(LABEL_WIDTH), "bold"), text), soft_wrap=True)
    by_set = {name: figures for name in SETS if (figures := _figures(found, name))}
    names = list(dict.fromkeys(name for figures in by_set.values() for name in figures))
    columns = [Column("", min_width=LABEL_WIDTH), *(Column(name, justify="right") for name in by_set)]
    rows = [[name, *(_cell(figures.get(name)) for figures in by_set.values())] for name in names]
    console.print()
    console.print(make_table(columns, rows))
    _show_clients(found, console)


def _figures(found: Evaluation, name: str) -> dict[str, float]:
    """Return the figures of a set of examples. The spread of the test set over the clients has a name of its own."""
    prefixes = (f"{name}/", "clients/") if name == "test" else (f"{name}/",)
    return {
        key.removeprefix(prefix): value
        for prefix in prefixes
        for key, value in found.metrics.items()
        if key.startswith(prefix)
    }


def _show_clients(found: Evaluation, console: Console) -> None:
    """Print a row for each of the first clients."""
    prefix = "client/"
    keys = [key.split("/", 2) for key in found.metrics if key.startswith(prefix)]
    scores, clients = list(dict.fromkeys(key[2] for key in keys)), sorted({int(key[1]) for key in keys})
    if not clients:
        return
    rows = [
        [
            str(client),
            f"{found.clients[client]:,}",
            *(_cell(found.metrics.get(f"{prefix}{client}/{score}")) for score in scores),
        ]
        for client in clients[:MAX_CLIENTS]
    ]
    columns = [Column(name, justify="right") for name in ("client", "examples", *scores)]
    console.print()
    console.print(make_table(columns, rows))
    if len(clients) > MAX_CLIENTS:
        console.print(f"... and {len(clients) - MAX_CLIENTS} more, which --json writes")


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)
