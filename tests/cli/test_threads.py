"""A run is resumed with the CPU threads of its first start, which divide its sums, or says what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.command import printed_by_work

SMALL = ["model=logistic", "model.inputs=64", "model.classes=10", "round.steps=1", "eval.every_rounds=9"]


def threads_and_output(overrides: list[str]) -> tuple[int, str]:
    """Run a worker on this live rank; return its number of threads afterwards, and what it has printed."""
    output = printed_by_work([*SMALL, *overrides])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads, output


@pytest.mark.parametrize("given", ["auto", "2"])
def test_a_resumed_run_has_the_threads_of_before(ranks, given: str, tmp_path: Path):
    """With `auto` it takes them again, whatever the machine has; another number is taken, with a word."""
    run = f"run_dir={tmp_path / 'run'}"
    ranks(2).run(threads_and_output, ["rounds=1", "launch.threads_per_worker=3", run])
    resumed = ranks(2).run(threads_and_output, ["rounds=2", f"launch.threads_per_worker={given}", run])
    assert [threads for threads, _ in resumed] == ([3, 3] if given == "auto" else [2, 2])
    expected = {
        "auto": "3 threads a worker, as before, so that all bits stay the same; launch.threads_per_worker=",
        "2": "launch.threads_per_worker=2, and the run has trained with 3 until now: ",
    }
    assert expected[given] in resumed[0][1]
    again = ranks(2).run(threads_and_output, ["rounds=3", f"launch.threads_per_worker={given}", run])
    assert [threads for threads, _ in again] == [threads for threads, _ in resumed]
    assert ("as before" in again[0][1]) == (given == "auto") and "has trained with" not in again[0][1]
