"""Metrics as JSON lines, the file that reports and notebooks read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from trainer.loggers.base import FinalArtifacts, Metrics


class JsonLinesLogger:
    """Logger that appends a JSON object per round to a file and flushes it.

    JSON has neither NaN nor infinity: both are written as null. A metric that was not measured has no key.

    keep_rounds: rounds of an existing file to keep. A resumed run passes those of its checkpoint; later rounds, which
        it runs again, are truncated.
    """

    def __init__(self, path: Path, keep_rounds: int = 0) -> None:
        if path.exists():
            os.truncate(path, _end_of_round(path, keep_rounds))
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)

    def log_round(self, metrics: Metrics) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Do nothing: the file holds rounds, and the run folder has a file for the result."""

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, in order; null becomes None.

    Text after the last newline, left by a killed write, is ignored.

    Raises:
        ValueError: a complete line is not JSON; the message has the file and the line number.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, location: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{location} is not JSON: {error}\n  remove the line, or restore the file from a copy"
        ) from error


def _end_of_round(path: Path, round: int) -> int:
    """Return the size in bytes of the file up to the end of this round's line."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or _parse(line, str(path))["round"] > round:
            break
        end += len(line)
    return end
