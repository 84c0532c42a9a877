"""The rounds of a run as JSON lines, the file that reports and notebooks read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from trainer.loggers.base import FinalArtifacts, Metrics


class JsonLinesLogger:
    """A sink that appends one JSON object a round to a file and flushes it at once.

    Every line is valid JSON, which has no NaN and no infinity: both are written as null. A diverged loss is
    therefore `null`; a metric that was not measured has no key.

    keep_rounds: the rounds of an existing file that stay, those of the checkpoint that a resumed run goes on from;
    what follows them will be run again, and is cut off.
    """

    def __init__(self, path: Path, keep_rounds: int = 0) -> None:
        if path.exists():
            os.truncate(path, _end_of_round(path, keep_rounds))
        self._file = open(path, "ab")  # noqa: SIM115 (lives until close)

    def log_round(self, metrics: Metrics) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Nothing: the lines are the rounds, the result has a file of its own."""

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; null is None.

    Text after the last newline is a write cut short by a kill, and is left out.
    Raises ValueError, naming the file and the line, if a whole line is not JSON.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}\n  remove the line, or restore the file from a copy") from error


def _end_of_round(path: Path, round: int) -> int:
    """The size of the file in bytes up to the end of this round's line."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or _parse(line, str(path))["round"] > round:
            break
        end += len(line)
    return end
