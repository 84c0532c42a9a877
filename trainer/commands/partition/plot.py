"""Picture of labels by clients: the area of a dot is a number of examples."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.data import Clients, Source, label_columns

COLUMN, MAX_WIDTH = 0.35, 40.0  # inches; columns of many clients are narrower
MIN_AREA = 1.0  # of a dot, in square points


def draw(clients: Clients, train: Source, label_names: tuple[str, ...] = ()) -> Figure:
    """Draw the training examples: a column for each client, a row for each label.

    Without labels, or with too many, the examples of each client are a bar.
    """
    labels, names = label_columns(train, label_names)
    column = min(COLUMN, MAX_WIDTH / len(clients))
    figure = Figure((2 + column * len(clients), 1 + COLUMN * (len(names) or 10)), layout="constrained")
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
