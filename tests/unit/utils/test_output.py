"""Output that cannot be encoded, and output that nobody takes: the program goes on to its end."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from trainer.loggers import make_terminal
from trainer.utils.output import CopiedStream, copied_output

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


@pytest.mark.parametrize(
    ("written", "copied"),
    [
        (["a\n", "b", "c\n"], "a\nbc\n"),
        (["1%\r", "2%\r", "\x1b[2Kdone\n"], "done\n"),
        (["\x1b[1;32mgreen\x1b[0m\ttab\x07\n"], "green\ttab\n"),
        (["\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\\n"], "link\n"),
        (["line\r\n"], "line\n"),
        (["gr\xfcn \udcff\n"], "gr\xfcn \\udcff\n"),
        (["no end"], ""),
    ],
)
def test_a_copy_has_the_lines_that_a_terminal_shows(tmp_path: Path, written: list[str], copied: str) -> None:
    screen, path = io.StringIO(), tmp_path / "console.log"
    stream = CopiedStream(screen, path)
    for text in written:
        assert stream.write(text) == len(text)
    assert screen.getvalue() == "".join(written)
    assert (path.read_text() if path.exists() else "") == copied


def test_a_copy_has_no_progress_bar(tmp_path: Path) -> None:
    stream = CopiedStream(io.StringIO(), tmp_path / "console.log")
    terminal = make_terminal(stream, is_terminal=True)  # pyright: ignore[reportArgumentType]
    terminal.line("begins")
    for step in range(3):
        terminal.progress(step / 3, f"at {step}")
        terminal.line(("round ", "bold"), f"{step} " + "x" * 200)
    terminal.progress(1.0, "at the end")
    terminal.close()
    terminal.line("ends")
    rounds = [f"round {step} " + "x" * 200 for step in range(3)]
    assert (tmp_path / "console.log").read_text().splitlines() == ["begins", *rounds, "ends"]


def test_both_streams_are_copied_until_the_block_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder that is made meanwhile; a file that cannot be written to stops nothing."""
    folder = tmp_path / "run"
    with copied_output(folder / "console.log"):
        print("lost")
        folder.mkdir()
        print("out", flush=True)
        print("err", file=sys.stderr)
        assert sys.stdout.isatty() is False
    with copied_output(folder / "console.log"):
        print("again")
    print("not")
    with copied_output(Path("/dev/full")):
        print("full")
    assert (folder / "console.log").read_text() == "out\nerr\nagain\n"
    assert (folder / "console.log").stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == "lost\nout\nagain\nnot\nfull\n"
