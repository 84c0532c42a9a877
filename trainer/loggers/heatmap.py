"""The heat map of one figure of a run's clients, drawn with Pillow.

Imports numpy and Pillow at its top: import this module when a run has finished.
"""

from __future__ import annotations

from io import BytesIO
from itertools import count
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trainer.loggers.client_history import ClientMetric
from trainer.loggers.messages import number

# Viridis, from worst to best: it grows lighter evenly, so it is read without telling red from green.
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
PAPER, LINES = 255, 190  # the greys of the hatching where there is no value

SMALLEST_CELL = 2  # pixels, a dot; where not even these fit, neighbours share one
LARGEST_CELL = (24, 60)  # pixels, height and width
LARGEST_FIELD = (600, 840)  # pixels, height and width of all cells together

FONT = ImageFont.load_default(13)
LINE = 18  # pixels from a line of text to the next
PADDING = 8
STRIP = (12, 160)  # pixels, height and width of the strip of all colours
VALUE_WIDTH = 90  # pixels, for the value beside either end of it
GAP_WIDTH = 110  # pixels, for what follows about gaps
ARROW = 8
WORST_WIDTH = 60  # pixels, for an arrow and the word

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Axis(NamedTuple):
    """One side of the field: so many entries, of which so many neighbours share a cell of so many pixels."""

    entries: int
    neighbours: int
    cell: int

    def middle(self, entry: int) -> float:
        """Where an entry lies, in pixels from the field's edge."""
        return (entry + 0.5) * self.cell / self.neighbours

    def stride(self, pixels: float) -> int:
        """The least round number of entries that lie so far apart."""
        strides = (digit * 10**zeros for zeros in count() for digit in (1, 2, 5))
        return next(stride for stride in strides if stride * self.cell >= pixels * self.neighbours)


class Scale(NamedTuple):
    """What the first and the last colour stand for; between them the colours go by the value, or by its logarithm."""

    worst: float
    best: float
    is_logarithmic: bool

    def shares(self, values: np.ndarray) -> np.ndarray:
        """How far the values lie on the way from worst to best, 0 to 1; NaN stays."""
        position = np.log if self.is_logarithmic else np.asarray
        way = position(self.best) - position(self.worst)
        return 1 - (position(self.best) - position(values)) / (way or 1)


def heat_map_png(metric: ClientMetric) -> bytes:
    """The picture of a figure as PNG: clients down, rounds across, dark what is worst, hatched what has no value.

    At most about 1,000 x 750 pixels: of many clients or rounds, neighbours share a cell, which shows the mean of
    their values. The colours of a perplexity go by its logarithm.
    """
    buffer = BytesIO()
    heat_map_image(metric).save(buffer, format="png")
    return buffer.getvalue()


def heat_map_image(metric: ClientMetric) -> Image.Image:
    """The same picture, not yet encoded."""
    down, across = map(fit_axis, metric.values.shape, LARGEST_CELL, LARGEST_FIELD)
    cells = cell_means(metric.values, down, across)
    scale = scale_of(metric, cells)
    field = Image.fromarray(paint(scale.shares(cells).repeat(down.cell, 0).repeat(across.cell, 1)))
    title, legend = _drawn_title(title_of(metric, down, across)), _legend(scale, bool(np.isnan(cells).any()))
    names = max(map(FONT.getlength, ("client", "round", str(metric.clients[-1]))))
    left, top = round(names) + 2 * PADDING, title.height + LINE + PADDING // 2
    right, bottom = left + field.width, top + field.height
    image = _blank(max(title.width, legend.width, right + WORST_WIDTH), bottom + LINE + legend.height)
    image.paste(title, (0, 0))
    image.paste(field, (left, top))
    image.paste(legend, (0, bottom + LINE))
    draw = ImageDraw.Draw(image)
    draw.font = FONT
    _name_rows(draw, (left, top, right, bottom), metric, down)
    _name_columns(draw, (left, top, right, bottom), metric, across)
    return image


def fit_axis(entries: int, largest_cell: int, most_pixels: int) -> Axis:
    """The axis with the largest cells that fit; an entry shares its cell with neighbours only if it must."""
    neighbours = -(-entries // (most_pixels // SMALLEST_CELL))
    cells = -(-entries // neighbours)
    return Axis(entries, neighbours, min(largest_cell, most_pixels // cells))


def cell_means(values: np.ndarray, down: Axis, across: Axis) -> np.ndarray:
    """The mean of each cell's values [cells down, cells across] without the missing ones, NaN if all are."""
    sums, counts = (_cell_sums(each, down, across) for each in (np.nan_to_num(values), ~np.isnan(values)))
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def _cell_sums(values: np.ndarray, down: Axis, across: Axis) -> np.ndarray:
    for dimension, side in enumerate((down, across)):
        values = np.add.reduceat(values, range(0, side.entries, side.neighbours), dimension, dtype=np.float64)
    return values


def scale_of(metric: ClientMetric, cells: np.ndarray) -> Scale:
    """The scale from the worst to the best of the cells."""
    least, greatest = float(np.nanmin(cells)), float(np.nanmax(cells))
    worst, best = (least, greatest) if metric.higher_is_better else (greatest, least)
    return Scale(worst, best, _is_logarithmic(metric))


def _is_logarithmic(metric: ClientMetric) -> bool:
    """A perplexity is the exponential of a loss, and as wide as that: its logarithm shows all of a run."""
    return metric.name.endswith("perplexity")


def paint(shares: np.ndarray) -> np.ndarray:
    """The colours of pixels [height, width], as uint8 [height, width, 3]; NaN is hatched.

    shares: 0 the worst colour, 1 the best.
    """
    anchors = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(shares, anchors, channel) for channel in COLOURS.T], -1)
    row, column = np.indices(shares.shape)
    hatching = np.where((row + column) % 6, PAPER, LINES)
    return np.where(np.isnan(shares)[..., None], hatching[..., None], colours.round()).astype(np.uint8)


def title_of(metric: ClientMetric, down: Axis, across: Axis) -> list[str]:
    """What is shown, who is worst, and what a cell is if it is not one client's value in one round."""
    worst = metric.worst()
    others = f" and {worst.ties:,} more" if worst.ties else ""
    colours = " (colours by its logarithm)" if _is_logarithmic(metric) else ""
    lines = [
        f"{metric.name.replace('_', ' ').capitalize()} of each client on its own test examples{colours}",
        f"worst in round {worst.round}: {number(worst.value)}, client {metric.clients[worst.row]}{others}",
    ]
    if down.neighbours * across.neighbours > 1:
        clients, rounds = (f"{side.neighbours} of the {side.entries:,}" for side in (down, across))
        lines.append(f"each cell is the mean of {clients} clients in {rounds} rounds")
    return lines


def _drawn_title(lines: list[str]) -> Image.Image:
    image = _blank(max(map(FONT.getlength, lines)) + 2 * PADDING, len(lines) * LINE + PADDING)
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((PADDING, PADDING + (index + 0.5) * LINE), line, fill="black", font=FONT, anchor="lm")
    return image


def _legend(scale: Scale, has_gaps: bool) -> Image.Image:
    """The strip of all colours between the values of its ends, and what hatching means if there is any."""
    height, width = STRIP
    image = _blank(width + 2 * VALUE_WIDTH + GAP_WIDTH, LINE + 2 * PADDING)
    draw, middle = ImageDraw.Draw(image), image.height // 2
    shares = np.tile(np.linspace(0, 1, width), (height, 1))
    image.paste(Image.fromarray(paint(shares)), (VALUE_WIDTH, middle - height // 2))
    draw.text((VALUE_WIDTH - PADDING, middle), number(scale.worst), fill="black", font=FONT, anchor="rm")
    best = VALUE_WIDTH + width
    draw.text((best + PADDING, middle), number(scale.best), fill="black", font=FONT, anchor="lm")
    if has_gaps:
        gap = Image.fromarray(paint(np.full((height, 2 * height), np.nan)))
        image.paste(gap, (best + VALUE_WIDTH, middle - height // 2))
        draw.text((best + VALUE_WIDTH + gap.width + PADDING, middle), "no value", fill="black", font=FONT, anchor="lm")
    return image


def _name_rows(draw: ImageDraw.ImageDraw, box: Box, metric: ClientMetric, down: Axis) -> None:
    """The clients' numbers left of the field, and an arrow on its right that points at the worst one's row."""
    left, top, right, _ = box
    draw.text((left - PADDING, top - LINE + PADDING // 2), "client", fill="grey", anchor="rm")
    for entry in range(0, down.entries, down.stride(LINE)):
        draw.text((left - PADDING, top + down.middle(entry)), str(metric.clients[entry]), fill="black", anchor="rm")
    tip, middle = right + PADDING // 2, top + down.middle(metric.worst().row)
    draw.polygon([(tip, middle), (tip + ARROW, middle - ARROW / 2), (tip + ARROW, middle + ARROW / 2)], fill="black")
    draw.text((tip + ARROW + PADDING // 2, middle), "worst", fill="black", anchor="lm")


def _name_columns(draw: ImageDraw.ImageDraw, box: Box, metric: ClientMetric, across: Axis) -> None:
    """The rounds' numbers below the field, the last one always among them."""
    left, _, _, bottom = box
    middle = bottom + LINE / 2
    draw.text((left - PADDING, middle), "round", fill="grey", anchor="rm")
    space = draw.textlength(str(metric.rounds[-1])) + 2 * PADDING
    for entry in range(across.entries - 1, -1, -across.stride(space)):
        if across.middle(entry) > space / 2:  # else it would run into the word
            draw.text((left + across.middle(entry), middle), str(metric.rounds[entry]), fill="black", anchor="mm")


def _blank(width: float, height: float) -> Image.Image:
    return Image.new("RGB", (round(width), round(height)), "white")
