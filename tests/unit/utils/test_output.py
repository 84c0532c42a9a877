"""Output that cannot be encoded, and output that nobody takes: the program goes on to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

PROGRAM = """
import sys
from trainer.utils.output import keep_output_harmless
keep_output_harmless()
for stream in (sys.stdout, sys.stderr):
    print("gr\\xfcn \\udcff", "x" * 100_000, file=stream, flush=True)
    print(stream.isatty(), end="", file=stream)
open("end", "w").close()
"""


def run(folder: Path, redirection: str, **environment: str) -> None:
    """Run the program with its output redirected; it must reach its end, and complain about nothing."""
    root = str(Path(trainer.__file__).parents[1])
    command = ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, PROGRAM]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": root, **environment}, capture_output=True, check=False
    )
    assert (folder / "end").exists(), done
    assert b"Error" not in done.stderr


@pytest.mark.parametrize(
    "redirection", ["| true", "2>&1 | head -c 10", "> /dev/full 2>&1", ">&- 2>&-", ">&-", "< /dev/null"]
)
def test_output_that_nobody_takes_is_dropped(tmp_path: Path, redirection: str) -> None:
    run(tmp_path, redirection)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_cannot_be_encoded_is_escaped(tmp_path: Path, encoding: str) -> None:
    run(tmp_path, "> out 2> err", PYTHONIOENCODING=encoding)
    for name in ("out", "err"):
        text = (tmp_path / name).read_bytes().decode(encoding)
        assert text.startswith("gr\\xfcn \\udcff" if encoding == "ascii" else "gr\xfcn \\udcff")
        assert text.endswith("x\nFalse")
