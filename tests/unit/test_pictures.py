"""The picture of a confusion matrix."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.image import imread

from trainer.metrics.pictures import LARGEST_SIDE, confusion_figure, confusion_png


def darkest_pixels(confusion: list[list[int]]) -> np.ndarray:
    """The mean row and column, in pixels, of the cells that hold their whole row."""
    image = imread(BytesIO(confusion_png(torch.tensor(confusion))))
    darkest = np.array(colormaps["Blues"](1.0), dtype=np.float32)
    return np.argwhere(np.abs(image - darkest).max(axis=-1) < 0.01).mean(axis=0)


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    hit, mistaken, other_class = (darkest_pixels(m) for m in ([[9, 0], [0, 0]], [[0, 9], [0, 0]], [[0, 0], [9, 0]]))
    assert mistaken[1] > hit[1] + 50 and abs(mistaken[0] - hit[0]) < 2
    assert other_class[0] > hit[0] + 50 and abs(other_class[1] - hit[1]) < 2


def test_every_cell_says_its_count_and_every_axis_the_names() -> None:
    confusion = torch.arange(9).reshape(3, 3) * 1000
    axes = confusion_figure(confusion, ("ant", "bee", "cat")).axes[0]
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): int(text.get_text()) for text in axes.texts}
    assert written == {(row, column): int(confusion[row, column]) for row in range(3) for column in range(3)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "bee", "cat"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee", "cat"]


def test_counts_stand_inside_their_cells() -> None:
    figure = confusion_figure(torch.full((10, 10), 1_234_567), tuple("a long name" for _ in range(10)))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    cell_width = axes.get_window_extent().width / 10
    assert all(text.get_window_extent().width < cell_width for text in axes.texts)


@pytest.mark.parametrize("classes", [1, 100])
def test_the_picture_of_many_classes_stays_in_bounds(classes: int) -> None:
    figure = confusion_figure(torch.eye(classes, dtype=torch.int64))
    assert max(figure.get_size_inches()) <= LARGEST_SIDE
    assert len(figure.axes[0].texts) == (1 if classes == 1 else 0)


def test_a_name_too_few_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        confusion_png(torch.eye(3, dtype=torch.int64), ("one", "two"))
