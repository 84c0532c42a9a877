"""The table on the console: whole words, and no line wider than the terminal."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.folders import write_run
from trainer.commands.report.run_records import read_records
from trainer.commands.report.summary import Spread, summarize
from trainer.commands.report.table import Cell, TableColumn, columns, fitting_table, show, spread_text
from trainer.utils.text import format_bytes


def printed(folder: Path, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    show(summarize(read_records([folder])), console)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for lr in ("0.1", "0.2"):
        for seed, accuracy in enumerate((0.5, 0.75)):
            folder = tmp_path / f"{lr}-{seed}"
            write_run(folder, f"optimizer.lr={lr}", "batch_size=8", seed=seed, test_accuracy=[accuracy + float(lr)])
    write_run(tmp_path / "3", "algorithm=fedavg", "silos=2", status="crashed", error="out of\nmemory")
    return tmp_path


def test_the_table_has_a_row_a_configuration_and_a_column_a_setting(sweep: Path) -> None:
    first, heading, _, *rows = printed(sweep, 200)
    assert first.startswith("5 runs of 3 configurations, best test/accuracy first")
    settings = ["algorithm", "silos", "batch_size", "lr"]
    figures = ["test/accuracy", "seeds", "examples/s", "seconds", "between", "silos"]
    assert heading.split() == [*settings, *figures, "unfinished"]
    assert rows[0].split() == ["Sync", "1", "8", "0.2", "0.8250", "±", "0.1768", "2", "1,000", "2.000", "400", "B"]
    assert rows[1].split()[3] == "0.1"
    assert rows[2].split() == ["FedAvg", "2", "32", "0.1", "–", "1", "–", "–", "–", "crashed", "0/20"]
    assert rows[3] == f"{sweep}/3: crashed 0/20: out of"


@pytest.mark.parametrize("width", [20, 50, 80, 120])
def test_no_line_is_wider_than_the_console(sweep: Path, width: int) -> None:
    """Paths are an exception: a terminal wraps them, so that they can be copied."""
    lines = [line for line in printed(sweep, width) if str(sweep) not in line]
    assert max(map(len, lines)) <= width
    assert width < 25 or any("0.8250 ± 0.1768" in line for line in lines)


def test_where_there_is_no_room_for_columns_configurations_follow_one_another(sweep: Path) -> None:
    lines = printed(sweep, 60)
    assert "algorithm=Sync, silos=1, batch_size=8, lr=0.2" in lines
    assert any(line.strip().startswith("test/accuracy 0.8250 ± 0.1768; seeds 2;") for line in lines)


def test_many_unfinished_runs_are_counted(tmp_path: Path) -> None:
    for number in range(12):
        write_run(tmp_path / str(number), seed=number, status="preempted")
    assert printed(tmp_path, 100)[-1] == "and 2 more unfinished runs: --csv FILE lists all"


WORDS = st.text("abc ", max_size=20)
NUMBERS = st.integers(0, 10**9).map(lambda value: Cell(str(value), value))


@example([(" aaa", "aaaaaaaa", Cell("0", 0))], 22)
@given(st.lists(st.tuples(WORDS, WORDS, NUMBERS), min_size=1, max_size=6), st.integers(5, 100))
def test_a_table_fits_or_there_is_none(rows: list[tuple[str, str, Cell]], width: int) -> None:
    first, second, numbers = zip(*rows, strict=True)
    texts = [TableColumn("one two", True, list(map(Cell, each))) for each in (first, second)]
    table = fitting_table([*texts, TableColumn("count", False, list(numbers))], width)
    console = Console(file=StringIO(), width=width)
    if table is None:
        assert width < 3 * 20 + 2 * 3
        return
    console.print(table)
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, shown.splitlines())) <= width
    words = {word for row in rows for text in (row[0], row[1], row[2].text) for word in text.split()}
    assert words <= set(shown.split())


@pytest.mark.parametrize(("sent", "message"), [([400], ["between silos"]), ([0], [])])
def test_what_says_nothing_has_no_column(tmp_path: Path, sent: list[float], message: list[str]) -> None:
    write_run(tmp_path / "a", test_accuracy=[0.5], bytes_between_silos=sent)
    headings = [column.heading for column in columns(summarize(read_records([tmp_path])))]
    assert headings == ["configuration", "test/accuracy", "seeds", "examples/s", "seconds", *message]


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(0.97216, 0.00312, 3), "0.9722 ± 0.0031"),
        (Spread(12345.6, 99.5, 2), "12,346 ± 100"),
        (Spread(1e-7, 1e-8, 2), "1.000e-07 ± 1.000e-08"),
        (Spread(0.5, float("nan"), 1), "0.5000"),
        (Spread(float("nan"), float("nan"), 2), "nan"),
        (Spread(float("nan"), float("nan"), 0), "–"),
    ],
)
def test_mean_and_deviation_have_the_same_decimals(spread: Spread, text: str) -> None:
    assert spread_text(spread) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.35 MB"), (1e21, "1e+06 PB")]
)
def test_bytes_are_said_in_the_unit_that_fits(count: float, text: str) -> None:
    assert format_bytes(count) == text
