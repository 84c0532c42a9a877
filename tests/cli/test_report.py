"""`python -m trainer report` on real runs: the console, the page in a real browser, the CSV files, and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command import Ended, Shell, work
from tests.support import browser
from tests.support.browser import Browser, new_browser, until
from trainer.commands import main as cli

RATES = ("0.1", "0.03")
SEEDS = (1, 2)
ROUNDS = 2

# Returns the drawn lines: their legend labels, their points with pixel positions, and the texts of the legend.
DRAWN = """
const texts = (kind) => [...document.querySelectorAll(`#curves ${kind}`)].map((text) => text.textContent);
const lines = document.getElementById("curves").data.filter((trace) => trace.hoverinfo !== "skip");
return {
  lines: lines.map((trace) => [trace.name, trace.yaxis, [...trace.x], [...trace.y]]),
  paths: [...document.querySelectorAll("#curves .scatterlayer .trace path.js-line")].filter(
    (path) => getComputedStyle(path).strokeWidth !== "0px").length, // a band is drawn as a line without width
  bands: document.querySelectorAll("#curves .scatterlayer .trace path.js-fill").length,
  points: document.querySelectorAll("#curves .scatterlayer .trace path.point").length,
  legend: texts(".legendtext"),
  axes: texts("[class^=y][class$=title]"),
};
"""


@pytest.fixture(scope="module")
def sweep(ranks, shell: Shell) -> Path:
    """Two learning rates with two seeds each."""
    for rate in RATES:
        for seed in SEEDS:
            choices = [f"rounds={ROUNDS}", "launch.nproc_per_node=1", f"optimizer.lr={rate}", f"seed={seed}"]
            ranks(1).run(work, [*choices, f"run_dir=sweep/{rate}-{seed}"], str(shell.folder))
    return shell.folder / "sweep"


def report(shell: Shell, *arguments: str) -> Ended:
    """Run the command in this process, in the folder of the shell."""
    with (
        chdir(shell.folder),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        code = cli.main(["report", *arguments])
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def reported(sweep: Path, shell: Shell) -> Ended:
    """Make a report of all runs, with its page and CSV files."""
    return report(shell, "sweep", "--csv", "runs.csv", "--curves", "curves.csv")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := browser.why_not():
        pytest.skip(reason)
    with new_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(window: Browser, reported: Ended, sweep: Path) -> Browser:
    """Return the browser, with the page loaded again."""
    window.open((sweep / "report.html").as_uri())
    window.wait_for("return document.querySelectorAll('#curves .legendtext').length")
    return window


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def result_of(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())


def test_the_table_has_a_row_a_configuration_the_best_first(reported: Ended, sweep: Path) -> None:
    assert (reported.code, reported.err) == (0, "")
    first, heading, _, *rows = reported.out.splitlines()
    assert first.startswith("4 runs of 2 configurations, best test/accuracy first")
    assert heading.split() == ["lr", "test/accuracy", "seeds", "examples/s", "seconds"]
    scores = {rate: [result_of(sweep / f"{rate}-{seed}")["test/accuracy"] for seed in SEEDS] for rate in RATES}
    best = max(RATES, key=lambda rate: np.mean(scores[rate]))
    assert rows[0].split()[0] == best
    assert rows[0].split()[1:5] == [f"{np.mean(scores[best]):.4f}", "±", f"{np.std(scores[best], ddof=1):.4f}", "2"]
    assert [line.split()[1] for line in rows[2:]] == ["sweep/report.html", "runs.csv", "curves.csv"]


def test_the_sheet_of_runs_has_all_results(reported: Ended, shell: Shell) -> None:
    rows = rows_of(shell.folder / "runs.csv")
    assert {(row["optimizer.lr"], row["seed"]) for row in rows} == {
        (rate, str(seed)) for rate in RATES for seed in SEEDS
    }
    for row in rows:
        result = result_of(shell.folder / row["run"])
        numbers = {name: value for name, value in result.items() if name != "monitor"}
        assert {name: float(row[name]) for name in numbers} == numbers


def lines_of(opened: Browser, axis: str) -> dict[str, Any]:
    """Return the drawn lines after choosing this axis."""
    choose = "const axis = document.getElementById('axis'); axis.value = arguments[0]; axis.onchange();"
    opened.run(choose, axis)
    title = "return [...document.querySelectorAll('#curves [class^=x][class$=title]')].map((text) => text.textContent)"
    until(lambda: set(opened.run(title)) == {"examples seen" if axis == "examples" else axis.replace("_", " ")})
    return opened.run(DRAWN)


@pytest.mark.parametrize("axis", ["round", "examples", "seconds", "bytes_between_silos"])
def test_the_page_draws_what_the_sheet_of_curves_says(opened: Browser, shell: Shell, axis: str) -> None:
    """There is a line for each configuration and metric, and a point for each round: the means over seeds."""
    rows = rows_of(shell.folder / "curves.csv")
    drawn = lines_of(opened, axis)
    figures = ["test/accuracy", "train/loss", "test/loss", "validation/accuracy"]
    assert set(drawn["legend"]) == {row["configuration"] for row in rows} == {"lr=0.1", "lr=0.03"}
    assert len(drawn["legend"]) == len(RATES), "one label a configuration"
    assert drawn["axes"] == figures
    assert len(drawn["lines"]) == drawn["paths"] == len(RATES) * len(figures)
    assert drawn["points"] == drawn["paths"] * ROUNDS
    assert drawn["bands"] == drawn["paths"], "two seeds have a deviation"
    for label, place, x, y in drawn["lines"]:
        figure = figures[int(place.removeprefix("y") or 1) - 1]
        for index, round in enumerate(map(str, range(1, ROUNDS + 1))):
            same = [row for row in rows if row["configuration"] == label and row["round"] == round]
            assert len(same) == len(SEEDS)
            assert y[index] == pytest.approx(np.mean([float(row[figure]) for row in same]), rel=1e-6)
            assert x[index] == pytest.approx(np.mean([float(row[axis]) for row in same]), rel=1e-6)


def test_the_page_needs_no_network_and_offers_none(opened: Browser) -> None:
    loaded = opened.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded == [] and opened.errors() == []
    buttons = opened.run("return [...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
    assert "Zoom" in buttons and not [title for title in buttons if "Share" in title or "Cloud" in title]


def test_the_table_of_the_page_is_that_of_the_console_and_can_be_sorted(opened: Browser, reported: Ended) -> None:
    table = "return [...document.querySelectorAll('#configurations tbody tr')].map((row) => row.innerText.trim())"
    rows = opened.run(table)
    assert [row.split() for row in rows] == [line.split() for line in reported.out.splitlines()[3:5]]
    place = "[...document.querySelectorAll('#configurations th')].find((head) => head.textContent === 'lr')"
    opened.run(f"{place}.click()")
    assert [row.split()[0] for row in opened.run(table)] == ["0.03", "0.1"]
    opened.run(f"{place}.click()")
    assert [row.split()[0] for row in opened.run(table)] == ["0.1", "0.03"]


def test_every_run_is_listed_with_a_link_to_its_folder(opened: Browser, sweep: Path) -> None:
    links = opened.run("return [...document.querySelectorAll('#runs a')].map((link) => link.href)")
    assert sorted(links) == sorted(f"{(sweep / f'{rate}-{seed}').as_uri()}/" for rate in RATES for seed in SEEDS)


@pytest.mark.long
def test_single_clients_are_drawn(ranks, window: Browser, shell: Shell) -> None:
    """There is a point for each client, and a heat map of clients and rounds.

    A single run is reported in its folder.
    """
    federated = ["algorithm=fedavg", "clients=3", "rounds=3", "launch.nproc_per_node=1", "run_dir=federated"]
    ranks(1).run(work, federated, str(shell.folder))
    ended = report(shell, "federated")
    assert ended.code == 0 and "page    federated/report.html" in ended.out
    window.open((shell.folder / "federated/report.html").as_uri())
    window.wait_for("return document.querySelectorAll('#clients path.point').length === 3")
    last = json.loads((shell.folder / "federated/metrics.jsonl").read_text().splitlines()[-1])
    values = window.run("return [...document.getElementById('clients').data[0].x]")
    assert values == pytest.approx([last[f"client/{client}/test_accuracy"] for client in range(3)], rel=1e-6)
    window.wait_for("return document.querySelectorAll('#heat-map .heatmaplayer image').length")
    drawn = window.run("const [map] = document.getElementById('heat-map').data; return [[...map.y], [...map.x], map.z]")
    assert drawn[:2] == [[0, 1, 2], [1, 2, 3]]
    assert [row[-1] for row in drawn[2]] == pytest.approx(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere is not a folder"),
        (("sweep", "--by", "test/acuracy"), "did you mean test/accuracy?"),
        (("sweep", "--csv", "sweep/0.1-1/config.yaml"), "exists and is not such a report"),
        (("sweep", "--html", "no/such/page.html"), "no such folder: no/such"),
    ],
)
def test_bad_input_is_one_message(
    arguments: tuple[str, ...],
    message: str,
    sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(sweep.parent)
    assert cli.main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and all(
        option in printed.out for option in ("FOLDER", "--by", "--html", "--csv", "--curves")
    )


# TensorBoard


@pytest.fixture(scope="module")
def board(sweep: Path) -> Iterator[str]:
    """Return the address of a TensorBoard that shows the sweep."""
    command = (sys.executable, "-m", "tensorboard.main", "--logdir", str(sweep), "--host", "127.0.0.1", "--port", "0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            line = next(line for line in server.stderr if "http://" in line)
            yield "http://" + line.partition("http://")[2].partition("/")[0]
        finally:
            server.terminate()


def ask(board: str, path: str, **question: object) -> Any:
    body = json.dumps(question).encode()
    request = urllib.request.Request(f"{board}/data/plugin/hparams/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def groups_of(board: str) -> list[dict[str, Any]]:
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    return ask(board, "session_groups", startIndex=0, sliceSize=100, colParams=[], allowedStatuses=statuses)[
        "sessionGroups"
    ]


def all_groups(board: str) -> list[dict[str, Any]]:
    """Return the session groups, after TensorBoard has read all runs to their ends."""

    def are_read() -> bool:
        groups = groups_of(board)
        return len(groups) == 4 and all(group["sessions"][0]["status"] == "STATUS_SUCCESS" for group in groups)

    until(are_read)
    return groups_of(board)


def test_tensorboard_compares_the_runs_by_hyperparameters(board: str, sweep: Path) -> None:
    """The HParams tab has a row for each run, with its configuration and the metrics of its result."""
    shown = {}
    for group in all_groups(board):
        figures = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        shown[group["hparams"]["optimizer.lr"], group["hparams"]["seed"]] = figures
    for rate in RATES:
        for seed in SEEDS:
            result = result_of(sweep / f"{rate}-{seed}")
            figures = shown[float(rate), seed]
            for name in ("test/accuracy", "test/loss", "train/loss", "validation/accuracy"):
                assert figures[name] == pytest.approx(result[name], rel=1e-6), name


def test_tensorboard_knows_which_hyperparameters_differ(board: str) -> None:
    """They are its first columns, which are visible without a click."""
    all_groups(board)
    infos = ask(board, "experiment", experimentName="")["hparamInfos"]
    differing = [info["name"] for info in infos if info["differs"]]
    assert differing == ["optimizer.lr", "seed"]
    assert [info["name"] for info in infos[:2]] == differing


def test_the_hparams_tab_shows_the_sweep(window: Browser, board: str) -> None:
    all_groups(board)
    window.open(f"{board}/#hparams")
    texts = """
    const found = [], open = [document];
    while (open.length) for (const node of open.pop().querySelectorAll("*")) {
      if (node.shadowRoot) open.push(node.shadowRoot);
      if (!node.children.length) found.push(node.textContent.trim());
    }
    return found;
    """
    shown = until(lambda: {"test/accuracy", "optimizer.lr", "0.030000"} <= set(found := window.run(texts)) and found)
    assert {"optimizer.lr", "seed", "test/accuracy", "test/loss"} <= set(shown)
