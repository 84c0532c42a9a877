"""Pictures of a result, drawn with Pillow: a worker does not pay the 43 MB that matplotlib takes."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from torch import Tensor

MAX_CLASSES_WITH_COUNTS = 40
SMALLEST_CELL = 30  # pixels, with a count in it
PICTURE_WITHOUT_COUNTS = 800  # pixels, the side of a matrix of so many classes that its cells are mere dots
PADDING = 8
FULL_SHARE = (8, 48, 107)  # the colour of a cell that holds its whole row; an empty one is white


def confusion_png(confusion: Tensor, label_names: tuple[str, ...] = ()) -> bytes:
    """The picture of a confusion matrix as PNG: rows the truth, columns the prediction.

    A cell says its count, up to 40 classes; its colour is the share of the row, so a rare class is seen as well as a
    common one. A class without examples has a white row.

    confusion: int64 [classes, classes]. label_names: one a class, or empty for the classes' numbers.
    """
    buffer = BytesIO()
    confusion_image(confusion, label_names).save(buffer, format="png")
    return buffer.getvalue()


def confusion_image(confusion: Tensor, label_names: tuple[str, ...] = ()) -> Image:
    """The same picture, not yet encoded."""
    from PIL import Image, ImageDraw, ImageFont  # only a run that finishes pays for them

    classes = len(confusion)
    names = label_names or tuple(str(label) for label in range(classes))
    assert confusion.shape == (classes, classes) and len(names) == classes, (confusion.shape, names)
    font = ImageFont.load_default(13)
    cell = cell_side(classes, font.getlength(str(int(confusion.max()))))
    margin = round(max(font.getlength(name) for name in names) + font.getlength("prediction")) + 3 * PADDING
    side = margin + classes * cell + PADDING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    draw.font = font
    _draw_cells(draw, confusion.tolist(), cell, margin)
    every = -(-16 // cell)  # names closer than their height would run into each other
    shown = [name if index % every == 0 else "" for index, name in enumerate(names)]
    image.paste(_names_strip(shown, "truth", margin, cell, font), (0, margin))
    # Turned clockwise the strip stands on the columns, its last name on the first.
    columns = _names_strip(shown[::-1], "prediction", margin, cell, font)
    image.paste(columns.transpose(Image.Transpose.ROTATE_270), (margin, 0))
    return image


def cell_side(classes: int, longest_count: float) -> int:
    """The side of a cell in pixels; with counts in it as long as there are few classes."""
    if classes > MAX_CLASSES_WITH_COUNTS:
        return max(1, PICTURE_WITHOUT_COUNTS // classes)
    return max(SMALLEST_CELL, round(longest_count) + PADDING)


def _draw_cells(draw: ImageDraw, counts: list[list[int]], cell: int, margin: int) -> None:
    for row, row_counts in enumerate(counts):
        for column, count in enumerate(row_counts):
            share = count / max(sum(row_counts), 1)
            left, top = margin + column * cell, margin + row * cell
            color = tuple(round(255 + share * (full - 255)) for full in FULL_SHARE)
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=color)
            if len(counts) <= MAX_CLASSES_WITH_COUNTS:
                middle = (left + cell / 2, top + cell / 2)
                draw.text(middle, str(count), fill="white" if share > 0.5 else "black", anchor="mm")


def _names_strip(names: list[str], title: str, width: int, cell: int, font: FreeTypeFont | ImageFont) -> Image:
    """The names beside the rows, right against the matrix, under their title."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, len(names) * cell), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((PADDING, len(names) * cell / 2), title, fill="grey", font=font, anchor="lm")
    for index, name in enumerate(names):
        draw.text((width - PADDING, (index + 0.5) * cell), name, fill="black", font=font, anchor="rm")
    return strip
