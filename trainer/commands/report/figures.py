"""The curves of a report as figures for a paper: PDF and PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.commands.report.output_files import OutputFile
from trainer.commands.report.page import PlotData, curves, drawn_names
from trainer.commands.report.summary import Report

MARK = "silotrain report"
INCHES, DOTS_PER_INCH = (6.0, 4.0), 200
# Without a date the same runs give the same bytes.
METADATA = {"pdf": {"Creator": MARK, "CreationDate": None}, "png": {"Software": MARK}}


def figures(report: Report, folder: Path) -> Iterator[OutputFile]:
    """Yield a PDF and a PNG for each metric that the page draws: a line a configuration, by round.

    A band is one standard deviation over the seeds.
    """
    names = drawn_names(report)
    lines = [(group.label, curves(group, names)) for group in report.configurations]
    for name in names:
        figure = _draw(name, [(label, drawn) for label, drawn in lines if name in drawn["figures"]])
        for kind, metadata in METADATA.items():
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
            path = folder / f"{re.sub('[^a-zA-Z0-9_]+', '-', name)}.{kind}"
            yield OutputFile("--figures", path, MARK, content.getvalue())


def _draw(name: str, lines: list[tuple[str, PlotData]]) -> Figure:
    figure = Figure(INCHES, layout="constrained")
    axes = figure.subplots()
    for label, drawn in lines:
        measured = drawn["figures"][name]
        kept = [place for place, value in enumerate(measured["mean"]) if value is not None]
        x, mean = ([values[place] for place in kept] for values in (drawn["x"]["round"], measured["mean"]))
        deviation = [measured["deviation"][place] or 0.0 for place in kept]
        (line,) = axes.plot(x, mean, marker="o" if len(x) == 1 else None)
        line.set_label(label.replace("$", r"\$"))  # a label is no formula
        if any(deviation):
            low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="round", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small", ncols=math.ceil(len(lines) / 20))
    return figure
