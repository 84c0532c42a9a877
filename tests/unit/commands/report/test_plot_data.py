"""The curves of a report and its files, against numpy and against the run folders."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
from io import StringIO
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pytest

from tests.support.folders import EXAMPLES, SECONDS, rounds_of, write_rounds, write_run
from trainer.commands.report.figures import figures
from trainer.commands.report.output_files import OutputFile, curves_csv, runs_csv, summary_csv, write_all
from trainer.commands.report.page import (
    curves,
    drawn_names,
    drawn_step_names,
    heat_maps,
    last_of_clients,
    page,
    step_curves,
)
from trainer.commands.report.run_records import read_records
from trainer.commands.report.summary import Report, summarize


def report_on(folder: Path) -> Report:
    return summarize(read_records([folder]))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def test_a_line_is_the_mean_over_seeds_by_round(tmp_path: Path) -> None:
    """The second seed has one more round, in which the mean is its value alone."""
    values = [[0.1, 0.4], [0.3, 0.5, 0.9]]
    for seed, accuracies in enumerate(values):
        write_run(tmp_path / str(seed), seed=seed, status="running", test_accuracy=accuracies)
    drawn = curves(report_on(tmp_path).configurations[0], ["test/accuracy"])
    figure = drawn["figures"]["test/accuracy"]
    assert drawn["x"]["round"] == [1, 2, 3]
    assert drawn["x"]["examples"] == [EXAMPLES, 2 * EXAMPLES, 3 * EXAMPLES]
    assert drawn["x"]["seconds"] == [SECONDS, 2 * SECONDS, 3 * SECONDS]
    assert figure["mean"] == pytest.approx([0.2, 0.45, 0.9])
    both = np.std([accuracies[:2] for accuracies in values], axis=0, ddof=1)
    assert figure["deviation"][:2] == pytest.approx(both.tolist()) and figure["deviation"][2] is None
    assert figure["runs"] == [2, 2, 1]


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    write_run(tmp_path / "0", seed=0, test_loss=[2.0, math.inf])
    write_run(tmp_path / "1", seed=1, test_loss=[4.0, 1.0])
    figure = curves(report_on(tmp_path).configurations[0], ["test/loss"])["figures"]["test/loss"]
    assert figure["mean"] == [3.0, None]


def test_the_score_is_drawn_first_and_counts_not_at_all(tmp_path: Path) -> None:
    write_run(tmp_path / "0", train_loss=[1.0], clients_trained=[3], test_accuracy=[0.5], slowest_data=[1.0])
    report = summarize(read_records([tmp_path]), "train/loss")
    assert drawn_names(report) == ["train/loss", "test/accuracy"]


def client_rounds(clients: int, rounds: int) -> list[dict[str, float | int]]:
    """Return metrics of rounds: client k has k + round / 100."""
    made = rounds_of({"test/accuracy": [0.5] * rounds})
    for metrics in made:
        metrics |= {f"client/{client}/test_accuracy": client + metrics["round"] / 100 for client in range(clients)}
    return made


def test_every_client_of_every_run_is_a_point_at_its_last_value(tmp_path: Path) -> None:
    for seed in (4, 5):
        write_rounds(tmp_path / str(seed), (), seed, client_rounds(2, rounds=3), "finished")
    drawn = last_of_clients(report_on(tmp_path).configurations[0].records)
    assert drawn == {
        "test_accuracy": {
            "values": [0.03, 1.03, 0.03, 1.03],
            "names": ["client 0, seed 4", "client 1, seed 4", "client 0, seed 5", "client 1, seed 5"],
        }
    }


def test_a_heat_map_holds_all_values(tmp_path: Path) -> None:
    write_rounds(tmp_path / "0", ("name=mine",), 7, client_rounds(2, rounds=3), "finished")
    (drawn,) = heat_maps(report_on(tmp_path))
    assert drawn["name"] == "mine, seed 7"
    figure = drawn["figures"]["test_accuracy"]
    assert (figure["clients"], figure["rounds"], figure["best"]) == ([0, 1], [1, 2, 3], "high")
    assert figure["values"] == [[0.01, 0.02, 0.03], [1.01, 1.02, 1.03]]


def test_large_heat_maps_leave_out_rounds_but_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.commands.report.page.MAX_CELLS", 10)
    write_rounds(tmp_path / "0", (), 0, client_rounds(3, rounds=8), "finished")
    (drawn,) = heat_maps(report_on(tmp_path))
    figure = drawn["figures"]["test_accuracy"]
    assert figure["rounds"] == [2, 5, 8] and [row[-1] for row in figure["values"]] == [0.08, 1.08, 2.08]


def test_the_sheet_of_runs_holds_all_of_the_results(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "optimizer.lr=0.1", test_accuracy=[0.5], test_loss=[1.5])
    write_run(tmp_path / "b", "optimizer.lr=0.2", "rounds=9", status="crashed", test_accuracy=[0.75])
    rows = rows_of(runs_csv(report_on(tmp_path)))
    assert [row["run"] for row in rows] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [row["status"] for row in rows] == ["finished", "crashed"]
    assert [row["optimizer.lr"] for row in rows] == ["0.1", "0.2"]
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert {name: float(rows[0][name]) for name in result} == result
    assert rows[1]["test/accuracy"] == "0.75" and rows[1]["test/loss"] == ""


def test_the_sheet_of_curves_holds_every_round_of_every_run(tmp_path: Path) -> None:
    write_run(tmp_path / "0", seed=0, test_accuracy=[0.1, 1 / 3])
    write_run(tmp_path / "1", seed=1, status="crashed", test_accuracy=[0.2])
    rows = rows_of(curves_csv(report_on(tmp_path)))
    assert [(row["seed"], row["round"]) for row in rows] == [("0", "1"), ("0", "2"), ("1", "1")]
    assert [float(row["test/accuracy"]) for row in rows] == [0.1, 1 / 3, 0.2]


def test_no_text_of_a_user_becomes_part_of_the_page(tmp_path: Path) -> None:
    wild = '</script><b>"&'
    write_run(tmp_path / "0", status="crashed", error=wild, test_accuracy=[0.5])
    write_run(tmp_path / "1", "algorithm=fedavg", "algorithm.shared_params='<b>'", test_accuracy=[0.5])
    text = page(report_on(tmp_path), tmp_path)
    assert wild not in text and "&lt;/script&gt;&lt;b&gt;&quot;&amp;" in text and "<b>&#x27;" not in text
    assert text.count("</script>") == 3


def test_a_page_names_its_runs_by_links_that_can_be_moved_with_them(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep/0", test_accuracy=[0.5])
    assert 'href="sweep/0/"' in page(report_on(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["javascript:alert(1)||", "data:text,x", "a?b#c%20", '"><b>', "\udcff", "- -x"])
def test_a_link_leads_to_a_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / name / "x", test_accuracy=[0.5])
    text = page(report_on(tmp_path), tmp_path)
    (link,) = re.findall('<td><a href="(.*?)">', text)
    parts = urlsplit(html.unescape(link))
    assert not (parts.scheme or parts.netloc or parts.query or parts.fragment)
    assert unquote_to_bytes(parts.path) == os.fsencode(f"{name}/x/")


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1+cmd", "-2+3", "@SUM(1)", "\t=1"])
def test_no_text_of_a_user_becomes_a_formula_of_a_sheet(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers stay numbers, negative ones too."""
    monkeypatch.chdir(tmp_path)
    write_run(Path(name), "optimizer.lr=-0.5", test_accuracy=[-0.25])
    write_run(Path("other"), test_accuracy=[0.5])
    report = summarize(read_records([Path(name), Path("other")]))
    for text in (runs_csv(report), curves_csv(report)):
        (row,) = (row for row in rows_of(text) if name in row["run"])
        assert row["run"] == f"'{name}"
        assert float(row["test/accuracy"]) == -0.25
    (row,) = (row for row in rows_of(runs_csv(report)) if name in row["run"])
    assert float(row["optimizer.lr"]) == -0.5


def test_only_reports_of_ours_are_overwritten(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours.csv", tmp_path / "other.csv"
    ours.write_text("run,configuration\n1,2\n")
    other.write_text("name,age\n1,2\n")
    text = "run,configuration\n"
    with pytest.raises(ValueError, match=r"other\.csv exists and is not such a report") as error:
        write_all(
            OutputFile("--csv", path, "run,configuration", text)
            for path in (ours, other, tmp_path, tmp_path / "no/file")
        )
    assert f"{tmp_path} is a folder" in str(error.value) and "no such folder" in str(error.value)
    assert ours.read_text() != text, "all or none"
    write_all(OutputFile("--csv", path, "run,configuration", text) for path in (ours, tmp_path / "new.csv"))
    assert ours.read_text() == text and sorted(tmp_path.iterdir()) == [tmp_path / "new.csv", other, ours]


def test_steps_are_drawn_by_themselves(tmp_path: Path) -> None:
    """They are no rounds: tables, curves by round and the CSV file are those of a run without them."""
    values = [[3.0, 2.0], [5.0, 4.0]]
    for seed, losses in enumerate(values):
        write_run(tmp_path / str(seed), seed=seed, test_accuracy=[0.5])
        with (tmp_path / str(seed) / "metrics.jsonl").open("a") as file:
            for index, loss in enumerate(losses, 1):
                file.write(json.dumps({"round": 2, "step": 10 * index, "train/loss": loss}) + "\n")
    report = report_on(tmp_path)
    assert drawn_step_names(report) == ["train/loss"]
    drawn = step_curves(report.configurations[0], ["train/loss"])
    assert drawn["x"] == {"step": [10, 20]}
    assert drawn["figures"]["train/loss"]["mean"] == [4.0, 3.0]
    assert drawn_names(report) == ["test/accuracy"]
    assert len(rows_of(curves_csv(report))) == 2


def test_the_summary_has_mean_and_deviation_of_each_configuration(tmp_path: Path) -> None:
    accuracies = [0.5, 0.7, 0.9]
    for seed, accuracy in enumerate(accuracies):
        write_run(tmp_path / str(seed), seed=seed, test_accuracy=[accuracy])
    write_run(tmp_path / "other", "optimizer.lr=0.5", test_accuracy=[0.6])
    rows = rows_of(summary_csv(report_on(tmp_path)))
    assert [(row["optimizer.lr"], row["seeds"], row["runs"]) for row in rows] == [("0.1", "3", "3"), ("0.5", "1", "1")]
    assert float(rows[0]["test/accuracy mean"]) == pytest.approx(np.mean(accuracies))
    assert float(rows[0]["test/accuracy std"]) == pytest.approx(np.std(accuracies, ddof=1))
    assert rows[1]["test/accuracy std"] == ""


def test_figures_are_pdf_and_png_and_the_same_each_time(tmp_path: Path) -> None:
    """They replace each other, and nothing else."""
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), seed=seed, test_accuracy=[0.5, 0.6 + seed / 10], train_loss=[2.0, 1.0])
    write_run(tmp_path / "runs" / "other", "optimizer.lr=0.5", test_accuracy=[0.6, math.nan], train_loss=[2.0, 1.5])
    report = report_on(tmp_path / "runs")
    drawn = list(figures(report, tmp_path))
    assert {file.path.name for file in drawn} == {
        f"{name}.{kind}" for name in ("test-accuracy", "train-loss") for kind in ("pdf", "png")
    }
    for _ in range(2):
        write_all(drawn)
    assert (tmp_path / "test-accuracy.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "test-accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert [file.content for file in figures(report, tmp_path)] == [file.content for file in drawn]
    (tmp_path / "train-loss.png").write_bytes(b"a photograph")
    with pytest.raises(ValueError, match=r"--figures .*train-loss\.png exists and is not such a report"):
        write_all(drawn)
