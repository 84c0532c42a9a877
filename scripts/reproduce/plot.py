"""Plot runs against each other.

    python -m scripts.reproduce.plot OUT.png label=RUN_FOLDER ... [--x examples]

Several folders with one label are seeds of one configuration: their mean is drawn, and their range as a band.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from trainer.loggers import read_jsonl


def curve(folder: Path, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of x and y in the rounds that have both."""
    rounds = [line for line in read_jsonl(folder / "metrics.jsonl") if x in line and y in line]
    return np.array([line[x] for line in rounds]), np.array([line[y] for line in rounds], dtype=float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="label=RUN_FOLDER")
    parser.add_argument("--x", default="round")
    parser.add_argument("--y", default="test/accuracy")
    parser.add_argument("--line", type=float, help="the height of a horizontal line")
    choices = parser.parse_args()
    groups: dict[str, list[Path]] = defaultdict(list)
    for run in choices.runs:
        label, _, folder = run.partition("=")
        groups[label].append(Path(folder))
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for label, folders in groups.items():
        curves = [curve(folder, choices.x, choices.y) for folder in folders]
        shortest = min(len(values) for _, values in curves)
        values = np.stack([values[:shortest] for _, values in curves])
        xs = curves[0][0][:shortest]
        (line,) = axes.plot(xs, values.mean(0), label=label)
        axes.fill_between(xs, values.min(0), values.max(0), color=line.get_color(), alpha=0.25, linewidth=0)
    if choices.line is not None:
        axes.axhline(choices.line, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel=choices.x, ylabel=choices.y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    choices.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(choices.out, dpi=110)


if __name__ == "__main__":
    main()
