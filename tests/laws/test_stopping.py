"""A run that stops early is the beginning of the full run.

Its last round is found by hand, and is the same on resume.
"""

from __future__ import annotations

from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws.cases import CASES, SIZES, TEST_EXAMPLES, Records, assert_same, case_run, leaves, silos_of
from tests.laws.test_midround import LeavesWhile
from tests.laws.test_resume import round_checkpoint, text_choices, timeless
from trainer.checkpoint import Checkpointer
from trainer.data import Clients
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop import round
from trainer.loop.control import LoopControl
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.loop.progress import Progress
from trainer.loop.stopping import Preempted, StopCriteria

ROUNDS = 8


def held_out(sizes: list[int], tests: int) -> Clients:
    """Return clients of these sizes, each of which holds its first example out."""
    edges = np.cumsum([0, *sizes])
    ids = [np.arange(start, end) for start, end in pairwise(edges)]
    test = tuple(np.arange(client, tests, len(sizes)) for client in range(len(sizes)))
    return Clients(tuple(mine[1:] for mine in ids), tuple(mine[:1] for mine in ids), test)


def choices_of(model: str, **choices: Any) -> dict[str, Any]:
    """Return choices of a classifier, whose accuracy is better if larger, or of a GPT, whose perplexity is not."""
    made, tests = (text_choices(0.2), 8) if model == "gpt" else ({}, TEST_EXAMPLES)
    return made | {"clients": held_out(SIZES, tests), "rounds": ROUNDS, "seed": 3} | choices


def run_until(
    name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, until: int | None = None, doing: str = ""
) -> tuple[dict[str, Any] | None, Records]:
    """Return the result, None for a preempted run, and the rounds since the newest checkpoint."""
    with distributed(silos_of(name, silos)) as topology:
        run, records = case_run(topology, name, choices), Records()
        checkpoints = Checkpointer(folder, topology, run.assignment_digest, keep=ROUNDS)
        contact = LeavesWhile(doing) if doing else LoopControl()
        try:
            result = fit(run, [records], checkpoints, checkpoints.latest(), until=until, control=contact)
            return result.metrics, records
        except Preempted:
            return None, records


def scores_of(records: Records, model: str) -> list[float]:
    """Return the validation scores by round; larger is better."""
    if model == "gpt":
        return [-metrics["validation/perplexity"] for metrics in records.rounds]
    return [metrics["validation/accuracy"] for metrics in records.rounds]


def rounds_with_patience(scores: list[float], patience: int) -> int:
    """Return, by hand, the first round with this number of scores after the first of the best of them."""
    for rounds in range(1, len(scores) + 1):
        so_far = scores[:rounds]
        if rounds - 1 - so_far.index(max(so_far)) >= patience:
            return rounds
    return len(scores)


def assert_is_the_beginning(folder: Path, whole: Path, rounds: int) -> None:
    """Assert that the last round checkpoint is that of the run that was not stopped."""
    ours, theirs = round_checkpoint(folder, rounds), round_checkpoint(whole, rounds)
    for section in ("model", "clients"):
        assert_same(leaves(ours.load(section)), leaves(theirs.load(section)))
    assert not list(folder.glob(f"round-{rounds + 1:06d}*"))


@pytest.mark.parametrize("model", ["mlp", "gpt"])
@pytest.mark.parametrize("name", ["sync", "diloco", "streaming"])
@pytest.mark.quick_rows(2)
def test_the_target_ends_the_first_round_that_reaches_it(ranks, name: str, model: str, tmp_path: Path):
    _, whole = ranks(2).run(run_until, name, 2, choices_of(model), tmp_path / "whole")[0]
    scores = scores_of(whole, model)
    wanted = sorted(scores)[ROUNDS // 2]
    rounds = next(index for index, score in enumerate(scores) if score >= wanted) + 1
    choices = choices_of(model, stop=StopCriteria(metric_target=abs(wanted)), **{"checkpoint.every_rounds": ROUNDS})
    results = [result for result, _ in ranks(2).run(run_until, name, 2, choices, tmp_path / "ours")]
    assert [(result["round"], result["stopped"]) for result in results] == [(rounds, "target")] * 2
    assert_is_the_beginning(tmp_path / "ours", tmp_path / "whole", rounds)


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_patience_counts_evaluations_in_vain_and_survives_a_resume(ranks, model: str, tmp_path: Path):
    """At a rate at which scores rise and fall, an interrupted run ends in the same round."""
    jumping = partial(torch.optim.SGD, lr=3.0, momentum=0.5)
    choices = choices_of(model, optimizer=jumping, round=RoundOptions(steps=2))
    _, whole = ranks(2).run(run_until, "fedavg", 2, choices, tmp_path / "whole")[0]
    scores = scores_of(whole, model)
    patience = next(p for p in (3, 2, 1) if 1 < rounds_with_patience(scores, p) < ROUNDS)
    rounds = rounds_with_patience(scores, patience)
    choices |= {"stop": StopCriteria(patience_evaluations=patience)}
    for until, reason in ((rounds - 1, None), (None, "patience"), (None, "patience")):
        outcomes = ranks(2).run(run_until, "fedavg", 2, choices, tmp_path / "ours", until)
        assert [(result["round"], result.get("stopped")) for result, _ in outcomes] == [(until or rounds, reason)] * 2
    assert outcomes[0][1].rounds == [], "what was run is not run again"
    assert_is_the_beginning(tmp_path / "ours", tmp_path / "whole", rounds)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(8)
def test_the_time_ends_a_round_like_the_last_one(ranks, name: str, tmp_path: Path):
    """A limit of 0 gives one round, evaluated and saved though not due, as in a run of one round."""
    choices = choices_of("mlp", **{"eval.every_rounds": ROUNDS, "checkpoint.every_rounds": ROUNDS})
    result, ours = ranks(2).run(
        run_until, name, 2, choices | {"stop": StopCriteria(max_training_seconds=0.0)}, tmp_path / "ours"
    )[0]
    _, theirs = ranks(2).run(run_until, name, 2, choices | {"rounds": 1}, tmp_path / "theirs")[0]
    assert result is not None and (result["round"], result["stopped"]) == (1, "seconds")
    assert_is_the_beginning(tmp_path / "ours", tmp_path / "theirs", 1)
    assert_same(timeless(ours.rounds[0]), timeless(theirs.rounds[0]))


def run_on_other_clocks(folder: Path) -> dict[str, Any]:
    """Run with a clock of rank 0 that advances by a second a reading; all others are far ahead."""
    with distributed(2) as topology:
        run = case_run(topology, "fedavg", choices_of("mlp", stop=StopCriteria(max_training_seconds=12)))
        times = count(0, 1) if topology.rank == 0 else count(10**6, 10**6)
        with patch.object(round, "perf_counter", lambda: float(next(times))):
            return fit(run, [], Checkpointer(folder, topology, run.assignment_digest)).metrics


def test_the_first_ranks_clock_is_everybodys(ranks, tmp_path: Path):
    results = ranks(2).run(run_on_other_clocks, tmp_path)
    assert results[0]["stopped"] == results[1]["stopped"] == "seconds"
    assert 1 < results[0]["round"] == results[1]["round"] < ROUNDS


def test_a_run_that_leaves_before_its_last_evaluation_stops_when_it_goes_on(ranks, tmp_path: Path):
    choices = choices_of("mlp", stop=StopCriteria(max_training_seconds=0.0), **{"eval.every_rounds": ROUNDS})
    assert ranks(2).run(run_until, "fedavg", 2, choices, tmp_path, None, "evaluating")[0][0] is None
    assert is_unevaluated(tmp_path)
    result, records = ranks(2).run(run_until, "fedavg", 2, choices, tmp_path)[0]
    assert result is not None and (result["round"], result["stopped"], len(records.rounds)) == (1, "seconds", 1)


def is_unevaluated(folder: Path) -> bool:
    return [path.name for path in folder.glob("round-*")] == ["round-000001-unevaluated"]


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, float("nan")]), min_size=1))
def test_evaluations_in_vain_are_those_since_the_first_of_the_best(scores: list[float]):
    progress = Progress()
    for score in scores:
        progress.record_score(score)
    known = [score for score in scores if score == score]
    assert progress.best_score == (max(known) if known else None)
    assert progress.evaluations_without_improvement == len(scores) - (scores.index(max(known)) + 1 if known else 0)
