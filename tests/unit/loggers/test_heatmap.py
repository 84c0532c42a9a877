"""The heat map of clients by rounds, and the figures it shows."""

from __future__ import annotations

import math
import struct
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.loggers import FinalArtifacts, JsonLinesLogger, TensorBoardLogger, read_jsonl
from trainer.loggers.base import Metrics
from trainer.loggers.client_history import ClientMetric, Worst, client_metrics
from trainer.loggers.heatmap import (
    COLOURS,
    LARGEST_CELL,
    LARGEST_FIELD,
    LINES,
    PAPER,
    SMALLEST_CELL,
    Axis,
    Scale,
    cell_means,
    fit_axis,
    heat_map_image,
    heat_map_png,
    paint,
    title_of,
)

WORST_COLOUR, BEST_COLOUR = (tuple(colour) for colour in COLOURS[[0, -1]].tolist())
BLACK = (0, 0, 0)
laws = settings(deadline=None, max_examples=80)


def figure(values: Any, name: str = "test_accuracy") -> ClientMetric:
    """Clients from 0 on, rounds from 1 on."""
    values = np.array(values, dtype=np.float64)
    clients, rounds = values.shape
    return ClientMetric(name, list(range(clients)), list(range(1, rounds + 1)), values)


# The figures

names = st.sampled_from(["test_accuracy", "personal_accuracy", "global_loss", "train_loss", "delta_norm"])
client_keys = st.tuples(st.integers(0, 12), names)
values = st.none() | st.integers() | st.floats()
histories = st.lists(st.dictionaries(client_keys, values), max_size=6)


@laws
@given(histories)
def test_a_figure_holds_every_finite_value_of_an_evaluation(rounds: list[dict[tuple[int, str], float | None]]) -> None:
    """All that the metrics say is found in the figures, and nothing else is; training is left out."""
    history = [
        {"round": 2 * index, "test/accuracy": 0.5}
        | {f"client/{client}/{name}": v for (client, name), v in each.items()}
        for index, each in enumerate(rounds)
    ]
    expected = {
        (name, client, 2 * index): float(value)
        for index, each in enumerate(rounds)
        for (client, name), value in each.items()
        if name not in ("train_loss", "delta_norm") and value is not None and math.isfinite(value)
    }
    figures = client_metrics(history)
    found = {
        (figure.name, figure.clients[row], figure.rounds[column]): figure.values[row, column]
        for figure in figures
        for row, column in np.argwhere(~np.isnan(figure.values))
    }
    assert found == expected
    assert [figure.name for figure in figures] == sorted({name for name, _, _ in expected})
    for figure in figures:
        assert figure.clients == sorted({client for each in rounds for client, _ in each})
        assert figure.rounds == [2 * i for i, each in enumerate(rounds) if any(n == figure.name for _, n in each)]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("test_accuracy", [[0.1, 0.9], [0.9, 0.3], [0.9, 0.7]], Worst(1, 2, 0.3, 0)),
        ("test_perplexity", [[9, 2], [9, 3], [9, 2]], Worst(1, 2, 3, 0)),
        ("personal_loss", [[9, 2], [9, 3], [9, 3]], Worst(1, 2, 3, 1)),
        ("test_accuracy", [[math.nan, 0.5, math.nan], [0.2, math.nan, math.nan]], Worst(0, 2, 0.5, 0)),
    ],
    ids=["least accuracy", "greatest perplexity", "one of two", "last round with values"],
)
def test_the_worst_is_the_worst_of_the_last_measured_round(name: str, values: Any, expected: Worst) -> None:
    assert figure(values, name).worst() == expected


# The cells

entries = st.integers(1, 10**6)


@laws
@given(entries, st.integers(2, 60), st.integers(60, 1000))
def test_cells_fill_their_side_and_are_shared_only_if_they_must(entries: int, largest: int, pixels: int) -> None:
    axis = fit_axis(entries, largest, pixels)
    cells = math.ceil(entries / axis.neighbours)
    assert SMALLEST_CELL <= axis.cell <= largest and cells * axis.cell <= pixels
    assert axis.cell == largest or cells * (axis.cell + 1) > pixels, "as large as they can be"
    fewer = axis.neighbours - 1
    assert fewer == 0 or math.ceil(entries / fewer) * SMALLEST_CELL > pixels, "fewer neighbours would not fit"


@laws
@given(st.builds(Axis, entries, st.integers(1, 5000), st.integers(2, 60)), st.floats(1, 100))
def test_names_stand_apart_at_round_numbers(axis: Axis, pixels: float) -> None:
    stride = axis.stride(pixels)
    assert axis.middle(stride) - axis.middle(0) >= pixels - 1e-6
    assert str(stride).rstrip("0") in ("1", "2", "5")


grids = arrays(
    np.float64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.floats(0, 1) | st.just(math.nan)
)


@laws
@given(grids, st.integers(1, 4), st.integers(1, 4))
def test_a_cell_is_the_mean_of_what_it_has(values: np.ndarray, clients: int, rounds: int) -> None:
    cells = cell_means(values, Axis(len(values), clients, 2), Axis(len(values[0]), rounds, 2))
    for row, column in np.ndindex(cells.shape):
        block = values[row * clients : (row + 1) * clients, column * rounds : (column + 1) * rounds]
        known = block[~np.isnan(block)]
        assert cells[row, column] == pytest.approx(known.mean() if len(known) else math.nan, nan_ok=True)


# The colours


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours [..., 3] of 0 to 255: 0 black, 100 white."""
    linear = np.where(colours <= 10.31, colours / 3294.6, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.00886, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_the_colours_grow_lighter_evenly() -> None:
    """Read as greys they show the same order, with steps that differ by less than half of their mean."""
    steps = np.diff(lightness(paint(np.linspace(0, 1, 17)[None])[0].astype(float)))
    assert (abs(steps / steps.mean() - 1) < 0.5).all()


@pytest.mark.parametrize(
    ("scale", "middle"),
    [(Scale(0.2, 0.8, False), 0.5), (Scale(100.0, 1.0, True), 10.0)],
    ids=["accuracy", "perplexity"],
)
def test_the_scale_goes_from_worst_to_best(scale: Scale, middle: float) -> None:
    shares = scale.shares(np.array([scale.worst, middle, scale.best, math.nan]))
    assert shares == pytest.approx([0, 0.5, 1, math.nan], nan_ok=True)


def test_of_equal_values_all_are_best() -> None:
    assert (Scale(0.5, 0.5, False).shares(np.full(3, 0.5)) == 1).all()


# The picture


def pixels(metric: ClientMetric) -> np.ndarray:
    """The picture as uint8 [height, width, 3], by way of its PNG."""
    return np.array(Image.open(BytesIO(heat_map_png(metric))))


def where(image: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """The rows and columns [N, 2] of the field's pixels of this colour; the scale below it is left out."""
    found = np.argwhere((image == colour).all(-1))
    return found[found[:, 0] < len(image) - 40]


@pytest.mark.parametrize("name", ["test_accuracy", "test_loss", "personal_perplexity"])
def test_rows_are_clients_and_columns_rounds(name: str) -> None:
    """The one best cell lies where its client and its round are; the rest are dark."""
    worst, best = (1, 2) if name.endswith("accuracy") else (2, 1)
    values = np.full((4, 5), worst)
    values[3, 1] = best
    image = pixels(figure(values, name))
    field, cell = where(image, WORST_COLOUR), where(image, BEST_COLOUR)
    height, width = LARGEST_CELL
    assert len(field) == (4 * 5 - 1) * height * width
    expected = [3 * height, width], [4 * height - 1, 2 * width - 1]
    assert ([cell.min(0), cell.max(0)] - field.min(0)).tolist() == list(map(list, expected))


def test_what_has_no_value_is_hatched_and_explained() -> None:
    """The pictures with and without a gap differ in its cell and in the line below that explains it."""
    whole, holed = pixels(figure([[2, 2], [3, 4]])), pixels(figure([[2, 2], [math.nan, 4]]))
    changed = (whole != holed).any(-1)
    hatched = np.argwhere(changed[:-40])
    assert set(np.unique(holed[:-40][changed[:-40]])) == {PAPER, LINES}
    assert (np.ptp(hatched, 0) + 1).tolist() == list(LARGEST_CELL)
    assert changed[-40:].any()


def test_numbers_stand_beside_rows_and_below_columns() -> None:
    """Other numbers change the margins, beside every client and below every round, and leave the field as it is."""
    shown = figure([[1, 2, 2], [2, 2, 2], [2, 2, 2]])
    image = pixels(shown)
    field = where(image, BEST_COLOUR)
    (top, left), bottom = field.min(0), field[:, 0].max()
    height, width = LARGEST_CELL
    changed = np.argwhere((image != pixels(shown._replace(clients=[3, 4, 5]))).any(-1))
    rows = changed[changed[:, 0] >= top]
    assert (rows[:, 1] < left).all() and set((rows[:, 0] - top) // height) == {0, 1, 2}
    changed = np.argwhere((image != pixels(shown._replace(rounds=[4, 5, 6]))).any(-1))
    columns = changed[changed[:, 0] >= top]
    assert (columns[:, 0] > bottom).all() and set((columns[:, 1] - left) // width) == {0, 1, 2}


@pytest.mark.parametrize("row", [0, 2])
def test_an_arrow_points_at_the_worst_client(row: int) -> None:
    values = np.full((3, 4), 0.5)
    values[row, -1] = 0.1
    image = pixels(figure(values))
    field = where(image, BEST_COLOUR)
    arrow = where(image, BLACK)
    arrow = arrow[(arrow[:, 1] > field[:, 1].max()) & (arrow[:, 0] > field[:, 0].min() - 5)]
    pointed = (arrow[:, 0].mean() - field[:, 0].min()) / LARGEST_CELL[0]
    assert pointed == pytest.approx(row + 0.5, abs=0.2)


def test_the_title_says_who_is_worst_and_what_a_cell_is() -> None:
    shown = figure([[0.9, 0.8], [0.9, 0.25], [0.9, 0.25]])
    alone = Axis(3, 1, 24), Axis(2, 1, 60)
    assert title_of(shown, *alone) == [
        "Test accuracy of each client on its own test examples",
        "worst in round 2: 0.2500, client 1 and 1 more",
    ]
    assert title_of(shown, Axis(1200, 4, 2), alone[1])[2:] == [
        "each cell is the mean of 4 of the 1,200 clients in 1 of the 2 rounds"
    ]
    assert "logarithm" in title_of(figure([[1, 2]], "test_perplexity"), *alone)[0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (40, 500), (301, 421), (1000, 2000), (20_000, 3)])
def test_the_picture_stays_in_bounds(shape: tuple[int, int]) -> None:
    """Its size is that of the field and a margin of words, whatever the numbers of clients and rounds."""
    values = np.random.default_rng(0).random(shape)
    image = heat_map_image(figure(values))
    assert image.height <= LARGEST_FIELD[0] + 160 and image.width <= LARGEST_FIELD[1] + 160
    assert len(heat_map_png(figure(values))) < 2_000_000


# In TensorBoardLogger


def of_clients(round: int) -> Metrics:
    """A round of three clients: the last has no test examples; rounds divisible by three are not evaluated."""
    trained: Metrics = {f"client/{client}/train_loss": 1 / round for client in range(3)}
    judged: Metrics = {f"client/{client}/test_accuracy": 1 - 1 / (round + client) for client in range(2)}
    return {"round": round} | trained | (judged if round % 3 else {})


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_heat_maps_show_the_rounds_before_a_resume_too(tmp_path: Path) -> None:
    """A run that was stopped after round 5 and goes on from round 4 has the picture of one that was never stopped."""

    def run(first: int, last: int, is_last: bool) -> None:
        lines = JsonLinesLogger(tmp_path / "metrics.jsonl", keep_rounds=first - 1)
        board = TensorBoardLogger(tmp_path / str(first), {}, first, partial(read_jsonl, tmp_path / "metrics.jsonl"))
        for round in range(first, last + 1):
            lines.log_round(of_clients(round))
            board.log_round(of_clients(round))
        if is_last:
            board.finalize({}, FinalArtifacts())
        lines.close()
        board.close()

    run(1, 5, is_last=False)
    run(5, 8, is_last=True)
    assert read_events(tmp_path / "1").Tags()["images"] == [], "drawn at the end alone"
    events = read_events(tmp_path / "5")
    assert events.Tags()["images"] == ["clients/test_accuracy"], "figures of training are charts only"
    (image,) = events.Images("clients/test_accuracy")
    (figure,) = client_metrics(map(of_clients, range(1, 9)))
    assert image.encoded_image_string == heat_map_png(figure) and image.step == 8
    assert (image.width, image.height) == struct.unpack(">II", image.encoded_image_string[16:24])
    assert figure.clients == [0, 1, 2] and figure.rounds == [1, 2, 4, 5, 7, 8]
