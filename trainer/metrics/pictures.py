"""Pictures of a result."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

LARGEST_SIDE = 18.0  # inches


def confusion_png(confusion: Tensor, label_names: tuple[str, ...] = ()) -> bytes:
    """The picture of a confusion matrix as PNG; see confusion_figure."""
    buffer = BytesIO()
    confusion_figure(confusion, label_names).savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def confusion_figure(confusion: Tensor, label_names: tuple[str, ...] = ()) -> Figure:
    """The picture of a confusion matrix: rows the truth, columns the prediction.

    A cell says its count, as long as the counts of all classes fit 18 inches; its colour is the share of the row,
    so a rare class is seen as well as a common one. A class without examples has a white row.

    confusion: int64 [classes, classes]. label_names: one a class, or empty for the classes' numbers.
    """
    from matplotlib.figure import Figure  # 0.4 s and 30 MB: only a run that finishes pays them

    classes = len(confusion)
    names = label_names or tuple(str(label) for label in range(classes))
    assert confusion.shape == (classes, classes) and len(names) == classes, (confusion.shape, names)
    counts = confusion.cpu()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = _side_for_counts(names, longest_count=len(str(int(counts.max()))))
    figure = Figure(figsize=(min(side, LARGEST_SIDE), min(side, LARGEST_SIDE)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.tolist(), cmap="Blues", vmin=0.0, vmax=1.0)
    _name_axes(axes, names)
    if side <= LARGEST_SIDE:
        _write_counts(axes, counts.tolist(), shares.tolist())
    return figure


def _side_for_counts(names: tuple[str, ...], longest_count: int) -> float:
    """The side in inches of a square whose cells hold counts of so many digits, beside the names."""
    inches_per_cell = max(0.4, 0.1 * longest_count)
    inches_for_names = 0.8 + 0.08 * max(map(len, names))
    return inches_for_names + inches_per_cell * len(names)


def _name_axes(axes: Axes, names: tuple[str, ...]) -> None:
    every = 1 + len(names) // 60  # labels closer than their height would run into each other
    ticks = list(range(0, len(names), every))
    shown = [names[tick] for tick in ticks]
    axes.set_xticks(ticks, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(ticks, shown)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")


def _write_counts(axes: Axes, counts: list[list[int]], shares: list[list[float]]) -> None:
    for row, (row_counts, row_shares) in enumerate(zip(counts, shares, strict=True)):
        for column, (count, share) in enumerate(zip(row_counts, row_shares, strict=True)):
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
