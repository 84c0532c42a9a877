"""Metrics and samples of text as JSON lines, the files that reports and notebooks read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.loggers.base import FinalArtifacts, Metrics, TextSample
from trainer.utils.disk import naming_disk

SAMPLES = "samples.jsonl"


class JsonLinesLogger:
    """Logger that appends a JSON object per round to a file, which only its owner may read.

    JSON has neither NaN nor infinity: both are written as null. A metric that was not measured has no key. An object
    with the key `step` is of a single step within its round. Samples of text are in samples.jsonl beside the file, an
    object for each prompt and round.

    keep_rounds: rounds of an existing file to keep. A resumed run passes those of its checkpoint; later rounds, which
        it runs again, are truncated.
    keep_steps: of the round after these, the steps up to this one are kept too.
    """

    def __init__(self, path: Path, keep_rounds: int = 0, keep_steps: float = 0) -> None:
        self._keep_rounds, self._samples = keep_rounds, path.with_name(SAMPLES)
        self._lines = _RoundLines(path, keep_rounds, keep_steps)
        self._sample_lines: _RoundLines | None = None  # opened with the first of them

    def restore(self, metrics: Metrics) -> list[int]:
        """Log the last round that a checkpoint counts, if the file has lost it; return the rounds that stay lost."""
        last = int(metrics.get("round", 0))
        lost = sorted(set(range(1, last + 1)) - self._lines.rounds)
        if last in lost:
            self.log_round(metrics)
        return [round for round in lost if round < last]

    def log_round(self, metrics: Metrics) -> None:
        self._lines.append({key: value if math.isfinite(value) else None for key, value in metrics.items()})

    def log_step(self, metrics: Metrics) -> None:
        self.log_round(metrics)

    def log_samples(self, round: int, samples: Sequence[TextSample]) -> None:
        self._sample_lines = self._sample_lines or _RoundLines(self._samples, self._keep_rounds)
        for sample in samples:
            self._sample_lines.append({"round": round, "prompt": sample.prompt, "text": sample.text})

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        """Do nothing: the file holds rounds, and the run folder has a file for the result."""

    def close(self) -> None:
        self._lines.close()
        if self._sample_lines:
            self._sample_lines.close()


class _RoundLines:
    """A file of JSON lines whose first field is a round, cut off after the rounds and steps to keep.

    Attributes:
        rounds: in the file when it was opened.
    """

    def __init__(self, path: Path, keep_rounds: int, keep_steps: float = 0) -> None:
        self._path = path
        self.rounds: set[int] = set()
        end = 0
        for line in _lines(path) if path.exists() else ():
            round, step = _round_and_step(line, path)
            if round > keep_rounds and not (round == keep_rounds + 1 and 0 < step <= keep_steps):
                break
            if not step:
                self.rounds.add(round)
            end += len(line)
        with naming_disk(path):
            # Unbuffered: what a full disk refuses is not tried again when the file is closed.
            self._file = open(path, "ab", buffering=0, opener=_open_private)  # noqa: SIM115 (closed by `close`)
            self._file.truncate(end)

    def append(self, fields: Mapping[str, Any]) -> None:
        line = json.dumps(fields, allow_nan=False).encode() + b"\n"
        with naming_disk(self._path):
            while line:  # a disk that is nearly full takes a part, and refuses the rest
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, in order; null becomes None.

    Text after the last newline, left by a killed write, is ignored.

    Raises:
        ValueError: a complete line is no JSON object; the message has the file and the line number.
    """
    return list(iter_jsonl(path))


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `read_jsonl` returns, of which only one is in memory at a time."""
    for number, line in enumerate(_lines(path), start=1):
        yield _parse(line, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _parse(line: bytes, location: str) -> dict[str, Any]:
    remedy = "remove the line, or restore the file from a copy"
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{location} is not JSON: {error}\n  {remedy}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{location} is no JSON object\n  {remedy}")
    return parsed


def _round_and_step(line: bytes, path: Path) -> tuple[int, int]:
    """Return the round of a line, and its step, or 0. They come first: lines of thousands of clients are not parsed."""
    if found := re.match(rb'{"round": (\d+)(?:, "step": (\d+))?[,}]', line):
        return int(found[1]), int(found[2] or 0)
    metrics = _parse(line, str(path))
    round = metrics.get("round")
    if not isinstance(round, int):
        raise ValueError(f"{path} has a line without a round\n  remove the line, or restore the file from a copy")
    return round, metrics.get("step", 0)
