"""Numbers that are not finite: a client is left out, then ends the run; a synchronous run stops, or skips batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.cases import Records, assert_same, case_run, leaves, tiny_data
from trainer.checkpoint import Checkpointer
from trainer.data import DataSplits, TensorSource
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.loop.stopping import DivergedError
from trainer.utils.seeding import generator

EXAMPLES, BATCH, STEPS = 90, 10, 3
SIZES = [50, 40]


def data_with_infinity(round: int | None) -> DataSplits:
    """Return ninety examples, of which the first of this round is infinite."""
    inputs, targets = tiny_data(EXAMPLES, torch.float32).train.fetch(torch.arange(EXAMPLES))
    if round is not None:
        order = torch.randperm(EXAMPLES, generator=generator(0, "order", 0, 0))
        inputs[order[round * BATCH * STEPS]] = float("inf")
    clean, _ = tiny_data(EXAMPLES, torch.float32).train.fetch(torch.arange(EXAMPLES))
    return DataSplits(TensorSource(inputs, targets), TensorSource(clean, targets), 3)


def small_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Linear(6, 3)


def small_run(topology: Any, round: int | None, **choices: Any):
    defaults = {
        "sizes": SIZES,
        "module": small_model(),
        "data": data_with_infinity(round),
        "round": RoundOptions(steps=STEPS),
        "batch_size": BATCH,
        "rounds": 3,
    }
    return case_run(topology, "sync", defaults | choices)


def goes_on_without(folder: Path) -> tuple[tuple[int, int] | None, dict[str, Any], list[Any]]:
    """Return the window in which a run diverged, and the model and the skipped windows of a second try without it."""
    with distributed(1) as topology:
        window = None
        diverged = None
        run, model = small_run(topology, 1), None
        for _ in range(2):
            checkpoints = Checkpointer(folder, topology, run.assignment_digest)
            try:
                model = fit(run, (), checkpoints, checkpoints.latest(), diverged=diverged).model
            except DivergedError as error:
                diverged, window = error, error.window
        start = checkpoints.latest()
        assert model and start and start.round_checkpoint
        return window, leaves(model.state_dict()), start.round_checkpoint.load("progress")["json"]


def leaves_out_from_the_start() -> dict[str, Any]:
    """Return the model of a run on clean data that skips the same batches."""
    with distributed(1) as topology:
        run = small_run(topology, None)
        return leaves(fit(run, diverged=DivergedError("", (1, STEPS))).model.state_dict())


def test_a_window_of_batches_is_skipped(ranks, tmp_path: Path):
    """Only the round that diverged is skipped: the run is one that never saw its batches."""
    window, model, progress = ranks(2).run(goes_on_without, tmp_path)[0]
    assert window == (1, STEPS)
    assert '"skipped_windows": [[1, 0, 3]]' in progress
    assert_same(model, ranks(2).run(leaves_out_from_the_start)[0])


def diverges_for_ever() -> str:
    """Return the error if skipping does not help."""
    with distributed(1) as topology:
        run = small_run(topology, 1)
        with pytest.raises(DivergedError) as raised:
            fit(run, diverged=DivergedError("the loss is nan", (1, 2), [(0, 0, 1)] * 3))
        return f"{raised.value} {raised.value.window}"


def test_three_windows_are_the_most(ranks):
    assert ranks(2).run(diverges_for_ever)[0] == (
        "the loss is nan, though the batches of 3 windows are left out already None"
    )


def left_out(rounds: int, most: int) -> tuple[str, list[float]]:
    """Return the error of a run in which one client's updates are infinite, and the left-out clients of each round."""
    with distributed(2) as topology:
        inputs, targets = tiny_data(EXAMPLES, torch.float32).train.fetch(torch.arange(EXAMPLES))
        inputs[:1] = float("inf")
        data = DataSplits(TensorSource(inputs, targets), tiny_data(EXAMPLES, torch.float32).test, 3)
        choices = {
            "sizes": SIZES,
            "data": data,
            "module": small_model(),
            "rounds": rounds,
            "max_nonfinite_rounds": most,
        }
        run, records = case_run(topology, "fedavg", choices), Records()
        try:
            fit(run, [records])
        except DivergedError as error:
            return str(error), [metrics["clients/nonfinite"] for metrics in records.rounds]
        return "", [metrics["clients/nonfinite"] for metrics in records.rounds]


def test_a_client_that_is_left_out_too_often_ends_the_run(ranks):
    """Client 0 is left out of each round.

    Two rounds are tolerated; the third ends the run, and the error names the client.
    """
    message, rounds = ranks(2).run(left_out, 5, 3)[0]
    assert rounds == [1, 1] and "In 3 rounds in a row" in message and "this time 0" in message
    assert ranks(2).run(left_out, 2, 3)[0] == ("", [1, 1])
