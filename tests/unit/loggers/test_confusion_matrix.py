"""The picture of a confusion matrix."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.loggers.confusion_matrix import FULL_SHARE, PADDING, confusion_image, confusion_png

WHITE = (255, 255, 255)


def pixels(confusion: list[list[int]], names: tuple[str, ...] = ()) -> np.ndarray:
    """The picture as uint8 [height, width, 3], by way of its PNG."""
    return np.array(Image.open(BytesIO(confusion_png(torch.tensor(confusion), names))))


def cells(confusion: list[list[int]]) -> np.ndarray:
    """The pixels of every cell, uint8 [classes, classes, side, side, 3]: they fill the picture's lower right corner."""
    classes, largest = len(confusion), max(map(max, confusion))
    # Where cells lie depends on the number of classes and the longest count alone; here it is seen by their colour.
    diagonal = torch.eye(classes, dtype=torch.int64) * largest
    margin = where(pixels(diagonal.tolist()), FULL_SHARE).min()
    matrix = pixels(confusion)[margin:-PADDING, margin:-PADDING]
    side = len(matrix) // classes
    return matrix.reshape(classes, side, classes, side, 3).swapaxes(1, 2)


def where(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The rows and columns [N, 2] of the pixels of this colour."""
    return np.argwhere((image == color).all(-1))


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    matrices = [[9, 0], [0, 0]], [[0, 9], [0, 0]], [[0, 0], [9, 0]]
    hit, mistaken, other_class = (where(pixels(matrix), FULL_SHARE).mean(0) for matrix in matrices)
    assert mistaken[1] > hit[1] + 20 and abs(mistaken[0] - hit[0]) < 2
    assert other_class[0] > hit[0] + 20 and abs(other_class[1] - hit[1]) < 2


def test_the_colour_is_the_share_of_the_row() -> None:
    """A rare class is seen as well as a common one; one without examples is white."""
    corners = cells([[3, 1, 0], [300, 100, 0], [0, 0, 7]])[:, :, 0, 0].astype(int)
    assert (corners[0] == corners[1]).all()
    assert (
        corners[0] == [[round(255 + share * (full - 255)) for full in FULL_SHARE] for share in (0.75, 0.25, 0)]
    ).all()
    empty = cells([[5, 0], [0, 0]])[1]
    assert (empty[:, 0, 0] == WHITE).all()


def test_every_cell_says_its_count() -> None:
    """Wherever it stands, a count of the same share looks the same, and another count different."""
    shown = cells([[41, 41, 0], [0, 41, 41], [53, 0, 53]])
    assert (shown[0, 0] == shown[0, 1]).all() and (shown[0, 0] == shown[1, 2]).all()
    assert (shown[0, 2] == shown[1, 0]).all()
    assert (shown[2, 0] == shown[2, 2]).all() and (shown[2, 0] != shown[0, 0]).any()


def test_counts_stand_inside_their_cells() -> None:
    shown = cells([[1_234_567 * (row == column) for column in range(10)] for row in range(10)])
    for edge in (shown[:, :, 0], shown[:, :, -1], shown[:, :, :, 0], shown[:, :, :, -1]):
        assert (edge == edge[:, :, :1]).all(), "of one colour, that of the cell"


def test_the_names_stand_beside_rows_and_above_columns() -> None:
    """Names turned round turn both margins round, and leave the matrix as it is."""
    confusion = [[1, 2], [3, 4]]
    image, renamed = pixels(confusion, ("ant", "bee")), pixels(confusion, ("bee", "ant"))
    changed = np.argwhere((image != renamed).any(-1))
    margin = len(image) - PADDING - 2 * 30
    assert (changed.min(1) < margin).all(), "only in the margins"
    rows, columns = changed[changed[:, 1] < margin], changed[changed[:, 0] < margin]
    for names in (rows[:, 0], columns[:, 1]):
        assert set((names - margin) // 30) == {0, 1}, "beside both of the classes"


@pytest.mark.parametrize(("classes", "colours"), [(40, None), (41, {WHITE, FULL_SHARE}), (300, {WHITE, FULL_SHARE})])
def test_the_picture_of_many_classes_stays_in_bounds(classes: int, colours: set[tuple[int, ...]] | None) -> None:
    """From 41 classes on cells are dots without counts."""
    image = confusion_image(torch.eye(classes, dtype=torch.int64))
    assert max(image.size) < 1500
    matrix = np.array(image)[-PADDING - 10 : -PADDING, -PADDING - 10 : -PADDING].reshape(-1, 3)
    assert colours is None or set(map(tuple, matrix.tolist())) <= colours


def test_a_name_too_few_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        confusion_png(torch.eye(3, dtype=torch.int64), ("one", "two"))
