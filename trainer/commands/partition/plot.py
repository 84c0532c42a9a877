"""Plot of labels by clients: the area of a dot is a number of examples."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.data.partition.clients import MAX_LABEL_COLUMNS, Clients

# Pixels.
MAX_DOT = 34
MIN_COLUMN = 4
MAX_WIDTH = 4000  # of the picture, where columns are wider than MIN_COLUMN
PADDING, BAR_HEIGHT = 10, 240
INK = (8, 48, 107)


def draw(clients: Clients, labels: np.ndarray | None, label_names: tuple[str, ...] = ()) -> Image.Image:
    """Draw the training examples: a column for each client, a row for each label.

    Without labels, or with too many, the examples of each client are a bar.
    """
    names = _names(labels, label_names)
    column = max(MIN_COLUMN, min(MAX_DOT + 2, MAX_WIDTH // len(clients)))
    font = ImageFont.load_default(13)
    margin = 2 * PADDING + round(max([font.getlength(name) for name in names] + [font.getlength("examples")]))
    height = (MAX_DOT + 2) * len(names) if names else BAR_HEIGHT
    image = Image.new("RGB", (margin + column * len(clients) + PADDING, height + 4 * PADDING), "white")
    pen = ImageDraw.Draw(image)
    pen.font = font
    if names and labels is not None:
        _draw_dots(pen, _counts(clients, labels), names, column, margin)
    else:
        _draw_bars(pen, clients.sizes, column, margin)
    pen.text((margin, height + PADDING), f"clients 0 to {len(clients) - 1}", fill="grey")
    return image


def _names(labels: np.ndarray | None, label_names: tuple[str, ...]) -> list[str]:
    values = np.unique(labels) if labels is not None else np.empty(0, np.int64)
    if len(values) > MAX_LABEL_COLUMNS:
        return []
    return [label_names[value] if 0 <= value < len(label_names) else str(value) for value in values]


def _counts(clients: Clients, labels: np.ndarray) -> np.ndarray:
    """Return the numbers of training examples, int64 [labels, clients]."""
    values, numbered = np.unique(labels, return_inverse=True)
    columns = [np.bincount(numbered[ids], minlength=len(values)) for ids in clients.train]
    return np.stack(columns, 1)


def _draw_dots(pen: ImageDraw.ImageDraw, counts: np.ndarray, names: list[str], column: int, margin: int) -> None:
    row, most = MAX_DOT + 2, max(int(counts.max()), 1)
    for label, name in enumerate(names):
        middle = row * (label + 0.5) + PADDING
        pen.text((margin - PADDING, middle), name, fill="black", anchor="rm")
        for client in np.flatnonzero(counts[label]):
            radius = max(0.5, min(column, MAX_DOT) / 2 * (counts[label, client] / most) ** 0.5)
            x = margin + column * (client + 0.5)
            pen.ellipse((x - radius, middle - radius, x + radius, middle + radius), fill=INK)


def _draw_bars(pen: ImageDraw.ImageDraw, sizes: np.ndarray, column: int, margin: int) -> None:
    foot = BAR_HEIGHT + PADDING
    pen.text((margin - PADDING, PADDING), f"{sizes.max():,}", fill="black", anchor="ra")
    pen.text((margin - PADDING, foot), "examples", fill="grey", anchor="rd")
    for client, size in enumerate(sizes):
        left = margin + column * client
        top = foot - BAR_HEIGHT * size / max(sizes.max(), 1)
        pen.rectangle((left, top, left + max(column - 2, 1), foot), fill=INK)
