"""Loggers that write files: JSON lines round-trip byte by byte, TensorBoard's charts float by float."""

# The classes of protobuf's generated modules exist only at run time.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util.tensor_util import make_ndarray

import trainer.loggers
from tests.support.disk import fill_disk
from trainer.loggers import ConsoleLogger, FinalArtifacts, JsonLinesLogger, Logger, TensorBoardLogger, read_jsonl
from trainer.loggers.base import Metrics
from trainer.loggers.tensorboard import confusion_figure
from trainer.utils.disk import DiskError

OF_A_CLIENT = "client/3/test_accuracy"
ROUND: Metrics = {
    "round": 3,
    "examples": 1437,
    "seconds": 1.8,
    "examples_per_second": 12345.6,
    "train/loss": 0.43214,
    "validation/loss": 0.3,
    "validation/accuracy": 0.9,
    "test/accuracy": 0.97216,
    OF_A_CLIENT: 1 / 3,
    "bytes_between_silos": 2**40,
}
RESULT = {
    "test/accuracy": 0.97222,
    "test/loss": 0.1,
    "seconds": 12.5,
    "silos": [3, 3, 2],
}


@pytest.fixture(params=["console", "jsonl", "tensorboard"])
def logger(request: pytest.FixtureRequest, tmp_path: Path) -> Logger:
    loggers: dict[str, Callable[[], Logger]] = {
        "console": lambda: ConsoleLogger(10, Path("outputs/my digits"), stream=io.StringIO()),
        "jsonl": lambda: JsonLinesLogger(tmp_path / "metrics.jsonl"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path / "events", {}),
    }
    return loggers[request.param]()


def test_every_logger_closes_twice_without_a_round_or_a_result(logger: Logger, tmp_path: Path) -> None:
    logger.close()
    logger.close()
    assert not (tmp_path / "events").exists()


def test_no_logger_changes_the_metrics_that_the_next_one_gets(logger: Logger) -> None:
    metrics, result = dict(ROUND), dict(RESULT)
    logger.log_round(metrics)
    logger.finalize(result, FinalArtifacts())
    logger.close()
    assert metrics == ROUND and result == RESULT


def test_heavy_imports_wait_until_they_are_needed() -> None:
    code = """
import io, pathlib, sys
from trainer.loggers import ConsoleLogger, TensorBoardLogger
TensorBoardLogger(pathlib.Path("unused"), {}).close()
ConsoleLogger(1, stream=io.StringIO()).close()
print(sorted({"torch", "numpy", "tensorboard", "matplotlib", "rich"} & set(sys.modules)))
"""
    root = Path(trainer.loggers.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# JSON lines

numbers = st.integers() | st.floats()
figures = st.lists(st.dictionaries(st.text(), numbers), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jsonl")


def numbered(figures: list[Metrics], first: int = 1) -> list[Metrics]:
    """Return consecutive rounds with these metrics."""
    return [{**each, "round": round} for round, each in enumerate(figures, start=first)]


def write(path: Path, metrics: list[Metrics], keep_rounds: int = 0) -> None:
    logger = JsonLinesLogger(path, keep_rounds)
    for each in metrics:
        logger.log_round(each)
    logger.close()


@settings(deadline=None, max_examples=50)
@given(figures=figures)
def test_what_is_written_is_read_back_with_null_for_the_non_finite(folder: Path, figures: list[Metrics]) -> None:
    rounds = numbered(figures)
    write(folder / "all.jsonl", rounds)
    expected = [{key: value if math.isfinite(value) else None for key, value in each.items()} for each in rounds]
    assert read_jsonl(folder / "all.jsonl") == expected


@settings(deadline=None, max_examples=50)
@given(kept=figures, lost=figures, again=figures, torn=st.integers(0, 30))
def test_a_resumed_file_is_the_file_of_a_run_never_stopped(
    folder: Path, kept: list[Metrics], lost: list[Metrics], again: list[Metrics], torn: int
) -> None:
    """Rounds after the checkpoint are removed, also if a kill has cut the last line."""
    whole, resumed = folder / "whole.jsonl", folder / "resumed.jsonl"
    following = len(kept) + 1
    write(whole, numbered(kept) + numbered(again, following))
    write(resumed, numbered(kept))
    size = resumed.stat().st_size
    write(resumed, numbered(lost, following), keep_rounds=len(kept))
    os.truncate(resumed, max(size, resumed.stat().st_size - torn))
    write(resumed, numbered(again, following), keep_rounds=len(kept))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_round_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonLinesLogger(path)
    for rounds in (1, 2):
        logger.log_round({**ROUND, "round": rounds})
        assert len(read_jsonl(path)) == rounds
    logger.close()


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [{"round": 1, "train/loss": math.nan, "delta/norm": -math.inf}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"round": 1, "train/loss": None, "delta/norm": None}


def test_a_run_that_starts_anew_starts_its_file_anew(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [ROUND, ROUND])
    write(tmp_path / "metrics.jsonl", [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_write_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [ROUND, ROUND])
    path.write_bytes(path.read_bytes()[:-5])
    assert read_jsonl(path) == [ROUND]


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round": \n{"round": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2")):
        read_jsonl(path)


def test_a_resumed_run_refuses_a_file_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("no metrics\n")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        JsonLinesLogger(path, keep_rounds=1)
    assert path.read_text() == "no metrics\n"


@pytest.mark.parametrize("line", [b"[1, 2]\n", b"3\n", b"null\n", b'"text"\n', b"\x00\x00\n", b"\xff\n", b"{}\n"])
def test_a_line_that_is_no_round_is_named_before_the_run_resumes(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"{path}.*\n  remove the line"):
        JsonLinesLogger(path, keep_rounds=2)


@pytest.mark.parametrize(
    ("there", "lost", "kept"),
    [([1, 2, 3], [], [1, 2, 3]), ([1, 2], [], [1, 2, 3]), ([], [1, 2], [3]), ([1, 3], [2], [1, 3]), ([2], [1], [2, 3])],
)
def test_a_round_that_power_loss_has_taken_is_restored_or_named(
    tmp_path: Path, there: list[int], lost: list[int], kept: list[int]
) -> None:
    """The checkpoint of three rounds knows the metrics of the third."""
    path = tmp_path / "metrics.jsonl"
    write(path, [{**ROUND, "round": round} for round in [*there, 4]])
    logger = JsonLinesLogger(path, keep_rounds=3)
    assert logger.restore({**ROUND, "round": 3}) == lost
    logger.log_round({**ROUND, "round": 4})
    logger.close()
    assert read_jsonl(path) == [{**ROUND, "round": round} for round in [*kept, 4]]


def test_before_the_first_round_nothing_is_lost(tmp_path: Path) -> None:
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    assert logger.restore({}) == []
    logger.close()


def test_only_its_owner_reads_the_figures_of_clients(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [ROUND])
    logger = TensorBoardLogger(tmp_path / "board", {})
    logger.log_round(ROUND)
    logger.close()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"metrics.jsonl": 0o600, "board": 0o700, "board-clients": 0o700}


def test_a_long_history_is_not_held_in_memory(tmp_path: Path) -> None:
    """A resume reads 40 MB, of which it holds a line."""
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"round": 0, **{f"client/{client}/train_loss": 1 / 3 for client in range(10_000)}})
    path.write_text("".join(line.replace("0", str(round), 1) + "\n" for round in range(1, 101)))
    tracemalloc.start()
    logger = JsonLinesLogger(path, keep_rounds=99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    logger.close()
    assert path.stat().st_size > 30 * peak
    assert path.read_bytes().count(b"\n") == 99


@pytest.mark.parametrize("make", [JsonLinesLogger, lambda path: TensorBoardLogger(path, {})])
def test_a_full_disk_is_named_and_closing_is_quiet(
    mounted: Callable[[str], Path], make: Callable[[Path], Logger], recwarn: pytest.WarningsRecorder
) -> None:
    disk = mounted("size=64k")
    logger = make(disk / "log")
    logger.log_round(ROUND)
    other = fill_disk(disk)
    many: Metrics = {"round": 4, **{f"test/{index}": 0.0 for index in range(2000)}}
    with (
        patch.object(threading, "excepthook", lambda failure: None),
        pytest.raises(DiskError, match=rf"the disk of {disk}/log is full \(.*\n  make room, .* same run_dir"),
    ):
        logger.log_round(many)
    with suppress(DiskError):
        logger.close()
    other.unlink()
    again = make(disk / "log")
    again.log_round({**ROUND, "round": 1})
    again.close()


# TensorBoard


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, np.float32]]:
    """Return steps and values of a chart, in the order of the file."""
    return [(event.step, np.float32(event.value)) for event in events.Scalars(tag)]


def hparams(events: EventAccumulator, tag: str) -> bytes:
    return events.SummaryMetadata(tag).plugin_data.content


def test_the_charts_have_exactly_the_tags_and_values_given(tmp_path: Path) -> None:
    second = {"round": 4, "train/loss": math.inf, "delta/cosine": -1e-3}
    logger = TensorBoardLogger(tmp_path, {})
    logger.log_round(ROUND)
    logger.log_round(second)
    logger.close()
    events = read_events(tmp_path)
    tags = (ROUND.keys() | second.keys()) - {"round", OF_A_CLIENT}
    assert set(events.Tags()["scalars"]) == tags
    for tag in tags:
        given = [(metrics["round"], np.float32(metrics[tag])) for metrics in (ROUND, second) if tag in metrics]
        assert scalars(events, tag) == given, tag


def test_the_charts_of_single_clients_lie_beside_the_others(tmp_path: Path) -> None:
    """They have a separate folder, because the HParams tab has a column for every chart of the run's folder."""
    logger = TensorBoardLogger(tmp_path / "board", {})
    logger.log_round(ROUND)
    logger.log_round({"round": 4, "train/loss": 1.0})
    logger.close()
    events = read_events(tmp_path / "board-clients")
    assert events.Tags()["scalars"] == [OF_A_CLIENT]
    assert scalars(events, OF_A_CLIENT) == [(3, np.float32(1 / 3))]
    assert {path.name for path in tmp_path.iterdir()} == {"board", "board-clients"}


def test_without_clients_there_is_no_such_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "board", {})
    logger.log_round({"round": 1, "train/loss": 1.0})
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["board"]


def test_a_round_is_on_disk_at_once_and_its_charts_too(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "board", {})
    start = time.time()
    for index in range(1, 4):
        logger.log_round({**ROUND, "round": index})
        for folder, tags in (("board", ROUND.keys() - {"round", OF_A_CLIENT}), ("board-clients", {OF_A_CLIENT})):
            (path,) = (tmp_path / folder).iterdir()
            events = [event for event in LegacyEventFileLoader(str(path)).Load() if event.step == index]
            assert {value.tag for event in events for value in event.summary.value} == tags
            assert all(start <= event.wall_time <= time.time() for event in events)
    logger.close()


def test_the_hyperparameters_and_the_end_of_the_run_are_readable(tmp_path: Path) -> None:
    logger = TensorBoardLogger(
        tmp_path, {"lr": 0.1, "silos": 2, "amp": True, "name": "sgd", "clip": None, "limit": math.inf}
    )
    logger.log_round(ROUND)
    running = read_events(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(hparams(running, metadata.SESSION_START_INFO_TAG))
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values == {"lr": 0.1, "silos": 2.0, "amp": True, "name": "sgd", "clip": "null", "limit": "inf"}
    assert metadata.SESSION_END_INFO_TAG not in running.Tags()["tensors"]
    logger.finalize(RESULT, FinalArtifacts())
    logger.close()
    end = metadata.parse_session_end_info_plugin_data(hparams(read_events(tmp_path), metadata.SESSION_END_INFO_TAG))
    assert end.status == api_pb2.STATUS_SUCCESS
    assert start.start_time_secs <= end.end_time_secs <= time.time()


def test_the_result_ends_the_charts_of_its_measures_and_no_others(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, {})
    logger.log_round(ROUND)
    logger.finalize({**RESULT, "validation/accuracy": ROUND["validation/accuracy"]}, FinalArtifacts())
    logger.close()
    events = read_events(tmp_path)
    assert scalars(events, "test/accuracy") == [(3, np.float32(0.97216)), (3, np.float32(0.97222))]
    assert scalars(events, "test/loss") == [(3, np.float32(0.1))]
    assert len(scalars(events, "seconds")) == 1, "a run's seconds are not a round's"
    assert len(scalars(events, "validation/accuracy")) == 1, "a value that is there already is not repeated"
    assert set(events.Tags()["scalars"]) == (ROUND.keys() | {"test/loss"}) - {"round", OF_A_CLIENT}


def test_the_artifacts_are_an_image_and_a_verbatim_text(tmp_path: Path) -> None:
    sample = "ROMEO:\n\n  But *soft*, what `light`\nthrough yonder window breaks?"
    logger = TensorBoardLogger(tmp_path, {})
    logger.log_round(ROUND)
    logger.finalize(RESULT, FinalArtifacts(torch.eye(2, dtype=torch.int64), ("cat", "dog"), sample))
    logger.close()
    events = read_events(tmp_path)
    (image,) = events.Images("test/confusion")
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.step == 3
    assert (image.width, image.height) == struct.unpack(">II", image.encoded_image_string[16:24])
    (text,) = events.Tensors("test/sample/text_summary")
    lines = make_ndarray(text.tensor_proto).item().decode().split("\n")
    assert all(line.startswith("    ") for line in lines), "Markdown shows only indented text as it is"
    assert "\n".join(line[4:] for line in lines) == sample
    assert events.SummaryMetadata("test/sample/text_summary").plugin_data.plugin_name == "text"


def test_a_result_without_artifacts_shows_none(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, {})
    logger.finalize(RESULT, FinalArtifacts())
    logger.close()
    tags = read_events(tmp_path).Tags()
    assert tags["images"] == [] and tags["tensors"] == [metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG]


@pytest.mark.parametrize("purge_round", [1, 3, 5])
def test_a_resumed_run_hides_the_rounds_it_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purge_round: int
) -> None:
    def run(now: float, first: int, last: int, loss: float, purge: int | None) -> None:
        monkeypatch.setattr(time, "time", lambda: now)  # event files are read in the order of the times in their names
        logger = TensorBoardLogger(tmp_path, {"lr": loss}, purge)
        for index in range(first, last + 1):
            logger.log_round({"round": index, "train/loss": loss})
        logger.close()

    run(1e9, 1, 6, loss=1.0, purge=None)
    run(2e9, purge_round, 5, loss=2.0, purge=purge_round)
    events = read_events(tmp_path)
    expected = [(index, np.float32(2.0 if index >= purge_round else 1.0)) for index in range(1, 6)]
    assert scalars(events, "train/loss") == expected
    metadata.parse_session_start_info_plugin_data(hparams(events, metadata.SESSION_START_INFO_TAG))


# The confusion matrix


def cells(confusion: list[list[int]], names: tuple[str, ...] = ()) -> tuple[np.ndarray, list[list[str]]]:
    """Return the colors, uint8 [classes, classes, 3], and the texts of the cells."""
    axes = confusion_figure(torch.tensor(confusion), names).axes[0]
    (image,) = axes.images
    texts: list[list[str]] = [[""] * len(confusion) for _ in confusion]
    for text in axes.texts:
        column, row = map(round, text.get_position())
        texts[row][column] = text.get_text()
    return image.to_rgba(image.get_array(), bytes=True)[..., :3], texts


def test_a_cell_has_its_count_and_the_color_of_its_share_of_the_row() -> None:
    """A rare class is as visible as a common one; the row of a class without examples is white."""
    confusion = [[3, 1, 0], [300, 100, 0], [0, 0, 0]]
    colors, texts = cells(confusion)
    assert texts == [[str(count) for count in row] for row in confusion]
    assert (colors[0] == colors[1]).all() and len(np.unique(colors[0], axis=0)) == 3
    assert (colors[0, 0].astype(int) < colors[0, 1]).all(), "darker"
    assert (np.ptp(colors[2].reshape(-1, 3), axis=0) == 0).all() and colors[2].min() > 240


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    axes = confusion_figure(torch.tensor([[5, 2], [0, 7]]), ("ant", "bee")).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "prediction")
    for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
        assert [label.get_text() for label in labels] == ["ant", "bee"]
    (top,) = [text.get_text() for text in axes.texts if text.get_position() == (1, 0)]
    assert top == "2", "class 0 taken for class 1 is in the first row and the second column"
    lower, upper = axes.get_ylim()
    assert lower > upper, "the first row is the upper one"


def test_counts_stand_inside_their_cells() -> None:
    figure = confusion_figure(torch.eye(12, dtype=torch.int64) * 1_234_567)
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    cell = axes.get_window_extent(renderer).width / 12
    assert max(text.get_window_extent(renderer).width for text in axes.texts) < cell


@pytest.mark.parametrize("name", ["$x", "$\\\\foo$", "a $ b $ c", "\\\\", "</b>", "%s {0}", "", "a\nb"])
def test_a_name_is_no_formula(name: str) -> None:
    figure = confusion_figure(torch.eye(2, dtype=torch.int64), (name, "other"))
    FigureCanvasAgg(figure).draw()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [name, "other"]


@pytest.mark.parametrize(("classes", "counts"), [(40, 1600), (41, 0), (300, 0)])
def test_only_few_classes_have_counts_and_names(classes: int, counts: int) -> None:
    figure = confusion_figure(torch.eye(classes, dtype=torch.int64))
    assert len(figure.axes[0].texts) == counts
    assert max(figure.get_size_inches()) <= 20


def test_a_missing_label_name_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        confusion_figure(torch.eye(3, dtype=torch.int64), ("one", "two"))
