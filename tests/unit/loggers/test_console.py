"""The console: lines in a log, and a progress bar on a terminal."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import sys
import termios
import threading
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.loggers import ConsoleLogger, FinalArtifacts
from trainer.loggers.messages import number


class Clock:
    """A clock that a test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        for module in ("console", "terminal"):
            monkeypatch.setattr(f"trainer.loggers.{module}.monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def never() -> float:
    raise AssertionError("the loss was asked for, though nothing is shown")


@given(value=st.floats(min_value=-1e300, max_value=1e300))
def test_a_number_keeps_four_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.001e-4, abs=1e-320)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97216, "0.9722"),
        (0.5, "0.5000"),
        (0.0, "0.000"),
        (999.4, "999.4"),
        (999.96, "1,000"),
        (12345.6, "12,346"),
        (3, "3"),
        (1234567, "1,234,567"),
        (1e-5, "1.000e-05"),
        (1e12, "1.000e+12"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_are_said(value: float, text: str) -> None:
    assert number(value) == text


@pytest.fixture
def tensorboard_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Put a `tensorboard` on the path of commands."""
    program = tmp_path / "tensorboard"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("tensorboard_found")
def test_the_lines_of_a_log() -> None:
    """A round prints the first of accuracy, perplexity, loss; single clients and lists are only in the file."""
    stream = io.StringIO()
    console = ConsoleLogger(10, Path("outputs/my digits"), stream=stream)
    console.log_round(
        {"round": 3, "train/loss": 0.43214, "test/loss": 1.0, "test/accuracy": 0.97, "client/3/loss": 0.5}
    )
    slowest = {"slowest/silo": 1, "slowest/data": 0.2, "slowest/compute": 1.8}
    console.log_round(
        {"round": 10, "train/loss": math.nan, "validation/perplexity": 1234.4, "validation/loss": 7} | slowest
    )
    console.log_round({"round": 4, "test/loss": 0.25, "examples_per_second": 12345.6, "seconds": 1.8})
    result = {"status": "done", "test/accuracy": 0.97222, "client/3/loss": 0.5, "silos": [3, 5], "best": None}
    console.finalize({**result, "early": True, "examples": 50000}, FinalArtifacts())
    console.close()
    assert stream.getvalue().splitlines() == [
        "round  3/10  train loss 0.4321  test accuracy 0.9700",
        "round 10/10  train loss nan  validation perplexity 1,234  slowest silo 1: compute 1.800 s",
        "round  4/10  test loss 0.2500  12,346 examples/s  1.800 s",
        "status         done",
        "test/accuracy  0.9722",
        "early          True",
        "examples       50,000",
        "run folder     outputs/my digits",
        "TensorBoard    tensorboard --logdir 'outputs/my digits'",
    ]


@pytest.mark.parametrize(("data", "compute", "doing"), [(0.2, 1.8, "compute 1.800 s"), (2.5, 1.8, "data 2.500 s")])
def test_the_slowest_silo_is_said_with_what_it_did_longest(data: float, compute: float, doing: str) -> None:
    stream = io.StringIO()
    ConsoleLogger(1, stream=stream).log_round(
        {"round": 1, "slowest/silo": 3, "slowest/data": data, "slowest/compute": compute}
    )
    assert stream.getvalue() == f"round 1/1  slowest silo 3: {doing}\n"


def test_without_a_run_folder_the_summary_names_none() -> None:
    stream = io.StringIO()
    ConsoleLogger(1, stream=stream).finalize({"test/accuracy": 0.5}, FinalArtifacts())
    assert stream.getvalue() == "test/accuracy  0.5000\n"


def test_tensorboard_is_named_where_it_is_when_a_shell_would_not_find_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is beside the running Python: a virtual environment need not be activated."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    for python, command in (
        (tmp_path / ".venv/bin/python", ".venv/bin/tensorboard"),
        ("/a b/python", "'/a b/tensorboard'"),
    ):
        monkeypatch.setattr(sys, "executable", str(python))
        stream = io.StringIO()
        ConsoleLogger(1, Path("run"), stream=stream).finalize({}, FinalArtifacts())
        assert stream.getvalue().splitlines()[-1] == f"TensorBoard  {command} --logdir run"


def test_a_log_gets_progress_only_after_ten_seconds_of_silence(clock: Clock) -> None:
    """The rate counts the examples of all steps since the last progress, in all silos.

    The ETA begins at the first step.
    """
    stream = io.StringIO()
    console = ConsoleLogger(4, silos=2, stream=stream)
    clock.seconds += 1.0
    console.step(0.5, 400, lambda: 2.303)  # resumed half-way
    clock.seconds += 9.9
    console.step(0.6, 3000, never)
    clock.seconds += 0.1
    console.step(0.75, 2000, lambda: 0.5)
    clock.seconds += 9.0
    console.log_round({"round": 3})
    clock.seconds += 9.0
    console.step(0.8, 900, never)
    assert stream.getvalue().splitlines() == [
        " 50.0%  loss 2.303  800.0 examples/s",
        " 75.0%  loss 0.5000  1,000 examples/s  ETA 0:00:10",
        "round 3/4",
    ]


def test_a_terminal_is_redrawn_twice_a_second(clock: Clock) -> None:
    stream = io.StringIO()
    console = ConsoleLogger(4, is_terminal=True, stream=stream)
    losses = iter([3.0, 2.0, 1.0])  # a fourth call would raise StopIteration
    for _ in range(9):  # 0, 0.125, ..., 1 second
        console.step((clock.seconds - 1000) / 4, 100, lambda: next(losses))
        clock.seconds += 0.125
    console.close()
    assert list(losses) == []
    assert set(re.findall(r"loss (\S+)", stream.getvalue())) == {"3.000", "2.000", "1.000"}


@pytest.mark.parametrize("terminal", [False, True])
def test_a_step_that_shows_nothing_costs_next_to_nothing(terminal: bool) -> None:
    """It was measured at 0.2 microseconds; the limit leaves room for a busy machine."""
    console = ConsoleLogger(4, is_terminal=terminal, stream=io.StringIO())
    console.step(0.0, 1, lambda: 1.0)
    best = min(timeit.repeat(lambda: console.step(0.1, 1, never), number=1000, repeat=20)) / 1000
    console.close()
    assert best < 2e-6


def test_a_bar_starts_no_thread_and_leaves_the_standard_streams_alone(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = ConsoleLogger(4, is_terminal=True, stream=stream)
    threads = threading.enumerate()
    console.step(0.1, 100, lambda: 1.0)
    print("for the standard output")
    assert threading.enumerate() == threads
    console.close()
    assert capsys.readouterr().out == "for the standard output\n"
    assert "standard" not in stream.getvalue()


class Terminal:
    """A pseudo terminal, and the lines that its control sequences leave on the screen."""

    def __init__(self, columns: int = 100) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")
        self.sent = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while b"\x00" not in self.sent:
            self.sent += os.read(self._master, 1024)

    def stop(self) -> str:
        """Close the terminal, and return everything that was sent."""
        print("\x00", end="", file=self.stream, flush=True)
        self._reader.join(timeout=10)
        self.stream.close()
        os.close(self._master)
        return self.sent.decode().rstrip("\x00")


def screen(sent: str) -> list[str]:
    """Return the lines on the screen after carriage returns, line feeds, cursor up, and erase line, without colours."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", sent, flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif move := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(move[1])
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    yield terminal
    if not terminal.stream.closed:
        terminal.stop()


def test_rounds_scroll_above_the_bar(terminal: Terminal, clock: Clock) -> None:
    console = ConsoleLogger(2, stream=terminal.stream)
    clock.seconds += 1
    console.step(0.25, 500, lambda: 2.0)
    console.log_round({"round": 1, "train/loss": 1.5})
    clock.seconds += 10
    console.step(0.5, 5000, lambda: 1.0)
    sent = terminal.stop()
    first, bar = screen(sent)
    assert first == "round 1/2  train loss 1.500"
    assert re.fullmatch(r"━+.*  50\.0%  loss 1\.000  500\.0 examples/s  ETA 0:00:20", bar) and len(bar) <= 100
    assert "\x1b[1mround 1/2" in sent, "bold"


@pytest.mark.usefixtures("tensorboard_found")
def test_the_summary_takes_the_place_of_the_bar(terminal: Terminal) -> None:
    console = ConsoleLogger(1, Path("long/" * 40), stream=terminal.stream)
    console.step(0.5, 500, lambda: 2.0)
    console.log_round({"round": 1})
    console.finalize({"test/accuracy": 0.5}, FinalArtifacts())
    console.close()
    sent = terminal.stop()
    shown = [line for line in screen(sent) if line]
    assert shown == [
        "round 1/1",
        "test/accuracy  0.5000",
        "run folder     " + str(Path("long/" * 40)),
        "TensorBoard    tensorboard --logdir " + str(Path("long/" * 40)),
    ]
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 1, "the cursor that was hidden is back"


def test_a_run_that_crashes_leaves_its_rounds_and_the_cursor(terminal: Terminal) -> None:
    console = ConsoleLogger(3, stream=terminal.stream)
    console.step(0.1, 500, lambda: 2.0)
    console.log_round({"round": 1})
    console.close()
    sent = terminal.stop()
    assert [line for line in screen(sent) if line] == ["round 1/3"]
    assert sent.rindex("\x1b[?25h") > sent.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = ConsoleLogger(3, stream=terminal.stream)
    console.step(0.1, 500, lambda: 2.0)
    console.log_round({"round": 1, "seconds": 1.0})
    console.close()
    sent = terminal.stop()
    assert "\x1b" not in sent and len(sent.splitlines()) == 2
