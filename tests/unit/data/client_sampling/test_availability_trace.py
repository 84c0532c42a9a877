"""Clients that join and leave according to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.client_sampling.sampling import AvailabilityTrace, UniformSampler

CLIENTS, ROUNDS = 6, 8
Line = tuple[int, int, str]
lines = st.lists(
    st.tuples(st.integers(1, ROUNDS), st.integers(0, CLIENTS - 1), st.sampled_from(["join", "leave"])), max_size=20
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a path for a trace."""
    return tmp_path_factory.mktemp("trace") / "trace.csv"


def write(file: Path, events: Sequence[Line]) -> Path:
    file.write_text(
        "\n".join(["round,client,event", *(f"{round},{client},{event}" for round, client, event in events)])
    )
    return file


def replayed(events: Sequence[Line], rounds: int) -> tuple[int, ...]:
    """Return the clients of a round (from 1): all whose first event is not a join, then changed by each event."""
    first = {client: event for _, client, event in sorted(events, key=lambda event: event[0])[::-1]}
    available = {client for client in range(CLIENTS) if first.get(client) != "join"}
    for now in range(1, rounds + 1):
        for round, client, event in events:
            if round == now and event == "join":
                available.add(client)
            elif round == now:
                available.discard(client)
    return tuple(sorted(available))


@settings(deadline=None)
@given(lines)
def test_available_clients_are_those_of_a_replay(file: Path, events: list[Line]):
    """Lines of different rounds may be in any order; lines of one round apply in their order."""
    trace = AvailabilityTrace(write(file, events))
    for index in range(ROUNDS + 2):
        assert trace.sample(CLIENTS, 0, index) == replayed(events, index + 1)
    assert AvailabilityTrace(write(file, sorted(events, key=lambda event: -event[0]))).sample(
        CLIENTS, 0, 3
    ) == replayed(events, 4)


@settings(deadline=None)
@given(lines, st.integers(1, CLIENTS + 1), st.integers(0, 1000), st.integers(0, ROUNDS))
def test_a_size_draws_among_the_members(file: Path, events: list[Line], size: int, seed: int, index: int):
    """The sample is ascending and a pure function of seed and round, whatever was drawn before.

    A size may cover all members.
    """
    trace, members = AvailabilityTrace(write(file, events), size), replayed(events, index + 1)
    drawn = trace.sample(CLIENTS, seed, index)
    assert len(drawn) == len(set(drawn)) == min(size, len(members))
    assert set(drawn) <= set(members) and list(drawn) == sorted(drawn)
    assert all(type(client) is int for client in drawn)
    trace.sample(CLIENTS, seed + 1, index + 1)
    np.random.seed(seed)
    assert drawn == trace.sample(CLIENTS, seed, index) == AvailabilityTrace(file, size).sample(CLIENTS, seed, index)


def test_it_draws_others_in_other_rounds_and_with_other_seeds(file: Path):
    trace = AvailabilityTrace(write(file, []), 3)
    assert len({trace.sample(CLIENTS, 0, index) for index in range(20)}) > 5
    assert len({trace.sample(CLIENTS, seed, 0) for seed in range(20)}) > 5


def test_where_nobody_moves_it_draws_what_a_sample_is(file: Path):
    """The golden samples of the uniform sampler must never change."""
    trace = AvailabilityTrace(write(file, []), 3)
    assert all(trace.sample(10, 0, index) == UniformSampler(3).sample(10, 0, index) for index in range(10))


@pytest.mark.parametrize(
    "text",
    [
        "round,client,event\n2,0,leave\n4,3,join\n",
        "round, client, event\n2, 0, leave\n4, 3, join\n\n",
        "event,client,round\r\nleave,0,2 \r\njoin ,3,4\r\n",
        "\ufeffround,client,event\n2,0,leave\n4,3,join\n",
    ],
    ids=[
        "plain",
        "spaces and an empty line",
        "another order, with Windows line ends",
        "as spreadsheets write it",
    ],
)
def test_what_is_meant_is_read(file: Path, text: str):
    file.write_text(text, newline="", encoding="utf-8")
    cohorts = [AvailabilityTrace(file).sample(4, 0, index) for index in range(4)]
    assert cohorts == [(0, 1, 2), (1, 2), (1, 2), (1, 2, 3)]


COLUMNS = "round,client,event\n"
BAD = {
    "no round": (COLUMNS + "1,1,join\n0,0,join", "line 3"),
    "a round that is no number": (COLUMNS + "first,0,join", "line 2"),
    "a round that is not whole": (COLUMNS + "1.5,0,join", "line 2"),
    "an unknown event": (COLUMNS + "1,0,arrive", "line 2"),
    "a client below 0": (COLUMNS + "1,-1,join", "line 2"),
    "a client that is not there": (COLUMNS + "1,0,join\n2,6,join", "line 3"),
    "a line cut short": (COLUMNS + "1,0", "line 2"),
    "a missing column": ("round,event\n1,join", "line 1"),
    "a missing column, and no lines": ("round,event\n", "columns"),
    "no columns": ("1,0,join\n2,0,leave", "line 1"),
    "nothing": ("", "columns"),
    "a fault after an empty line": (COLUMNS + "1,0,join\n\n2,0,arrive", "line 4"),
}


@pytest.mark.parametrize(("text", "place"), BAD.values(), ids=BAD.keys())
def test_what_is_not_a_trace_is_refused(file: Path, text: str, place: str):
    """The error has the key, the line of the file and the valid format."""
    file.write_text(text)
    assert_refused(file, [place])


def test_a_file_of_another_code_is_refused(file: Path):
    """Some spreadsheets write UTF-16, and call it Unicode."""
    file.write_text(COLUMNS + "1,0,join", encoding="utf-16")
    assert_refused(file, [])


def test_a_file_that_is_missing_is_refused(tmp_path: Path):
    assert_refused(tmp_path / "nowhere.csv", ["No such file"])
    assert_refused(tmp_path, ["Is a directory"])


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_cannot_be_drawn_is_refused(file: Path, size: int):
    """As with client_sampling=sample, a round would have no client."""
    with pytest.raises(ValueError, match=rf"client_sampling\.clients_per_round={size}(.|\n)*valid: (.*from )?1"):
        AvailabilityTrace(write(file, []), size).sample(CLIENTS, 0, 0)


def assert_refused(file: Path, words: list[str]) -> None:
    with pytest.raises(ValueError, match="valid:") as refusal:
        AvailabilityTrace(file).sample(CLIENTS, 0, 0)
    message = str(refusal.value)
    missing = [part for part in (f"client_sampling.file={file}", *words) if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
