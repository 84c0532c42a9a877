"""Picture of labels by clients: the area of a dot is a number of examples. Beside it, if there are any, of points."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.data import Clients, Source, label_columns

COLUMN, MAX_WIDTH = 0.35, 40.0  # inches; columns of many clients are narrower
PLANE = 5.0  # inches of the sides of a plane of points
MIN_AREA = 1.0  # of a dot, in square points


def draw(
    clients: Clients,
    train: Source,
    label_names: tuple[str, ...] = (),
    points: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw the training examples: a column for each client, a row for each label.

    Without labels, or with too many, the examples of each client are a bar.

    Args:
        clients: the examples of each.
        train: the training source.
        label_names: names of the labels.
        points: ids of some examples and where they are in a plane, [n, 2]; drawn below, in the colour of their client.
    """
    labels, names = label_columns(train, label_names)
    column = min(COLUMN, MAX_WIDTH / len(clients))
    width, height = 2 + column * len(clients), 1 + COLUMN * (len(names) or 10)
    figure = Figure((max(width, PLANE), height + PLANE) if points else (width, height), layout="constrained")
    if points:
        axes, plane = figure.subplots(2, height_ratios=(height, PLANE))
        _scatter(plane, clients, len(train), *points)
    else:
        axes = figure.subplots()
    axes.set(xlabel="client", xlim=(-0.6, len(clients) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if names:
        counts = np.stack([np.bincount(labels[ids], minlength=len(names)) for ids in clients.train])
        owners, rows = np.nonzero(counts)
        largest = (72 * column) ** 2  # square points
        axes.scatter(owners, rows, np.maximum(largest * counts[owners, rows] / counts.max(), MIN_AREA))
        axes.set(ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), names)
    else:
        axes.bar(range(len(clients)), clients.sizes)
        axes.set(ylabel="examples")
    return figure


def _scatter(axes: Axes, clients: Clients, examples: int, ids: np.ndarray, points: np.ndarray) -> None:
    """Draw the points of training examples; those that are held out for validation are grey."""
    client_of = np.full(examples, -1)
    for client, mine in enumerate(clients.train):
        client_of[mine] = client
    owner = client_of[ids]
    axes.scatter(*points[owner < 0].T, s=MIN_AREA * 4, color="lightgrey")
    colour = {"c": owner[owner >= 0], "cmap": "turbo", "vmin": 0, "vmax": max(len(clients) - 1, 1)}
    axes.scatter(*points[owner >= 0].T, s=MIN_AREA * 4, **colour)
    axes.set(xlabel="first component", ylabel="second component")
