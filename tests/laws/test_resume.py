"""A resumed run is bit-equal to the uninterrupted one, in its whole state and all metrics."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tests.laws.cases import (
    CASES,
    COMBINED,
    SIZES,
    Records,
    adam,
    assert_close,
    assert_same,
    case_run,
    figures,
    leaves,
    silos_of,
    tiny_data,
)
from tests.support.runs import make_clients, make_data, make_model, make_task
from tests.unit.optim.test_state import Attribute, Countdown, Lists, OwnRate
from trainer.algorithms import FedAvg, FedOpt, Streaming
from trainer.checkpoint import Checkpointer, ResumePoint
from trainer.checkpoint.format import SavedState, find_saved
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.models import GPT, flat
from trainer.optim import GroupedOptimizerFactory, Muon
from trainer.optim.schedules import Cosine

ROUNDS, INTERRUPTED = 4, 2


def run_rounds(name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, until: int, resume: bool) -> Records:
    """Train to round `until`, from the start or from the newest checkpoint in the folder.

    Return the metrics of the rounds.
    """
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, {"rounds": ROUNDS, "checkpoint.every_rounds": INTERRUPTED} | choices)
        checkpoints = Checkpointer(folder, topology, run.assignment_digest)
        records = Records()
        fit(run, [records], checkpoints, checkpoints.latest() if resume else None, until=until)
        return records


def interrupted_and_not(pool, name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, runs=run_rounds):
    """Return the folders and the metrics of the last rounds, of a run in two parts and of the same run in one."""
    first, one = folder / "two_parts", folder / "one"
    pool.run(runs, name, silos, choices, first, INTERRUPTED, False)
    resumed = pool.run(runs, name, silos, choices, first, ROUNDS, True)[0]
    through = pool.run(runs, name, silos, choices, one, ROUNDS, False)[0]
    return (first, resumed.rounds), (one, through.rounds[INTERRUPTED:])


def assert_bit_equal(pool, name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path, runs=run_rounds) -> None:
    """Compare all saved sections except clock readings, and all metrics."""
    (ours, our_rounds), (theirs, their_rounds) = interrupted_and_not(pool, name, silos, choices, folder, runs)
    saved, expected = (round_checkpoint(path, ROUNDS) for path in (ours, theirs))
    assert saved.shards == expected.shards
    for section in ("model", "ema", "algorithm", "clients", "residuals"):
        assert_same(leaves(saved.load(section)), leaves(expected.load(section)))
    assert torch.equal(*(each.load("progress")["participations"] for each in (saved, expected)))
    assert len(our_rounds) == ROUNDS - INTERRUPTED
    for our_round, their_round in zip(our_rounds, their_rounds, strict=True):
        assert_same(timeless(our_round), timeless(their_round))
        assert our_round["bytes_between_silos"] == their_round["bytes_between_silos"]


def round_checkpoint(folder: Path, rounds: int) -> SavedState:
    """Return the round checkpoint after this number of rounds."""
    saved = find_saved(folder / f"round-{rounds:06d}")
    assert saved and not saved.errors()
    return saved


def timeless(metrics: Metrics) -> Metrics:
    clocks = ("per_second", "stall_seconds")
    return {key: value for key, value in figures(metrics).items() if not key.endswith(clocks)}


def noisy_model() -> nn.Module:
    """Return a float32 model with dropout and batch statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def noisy_choices(name: str) -> dict[str, Any]:
    """Return choices with dropout, batch statistics and a cosine schedule.

    If the algorithm supports them, clients are sampled and rounds have steps across epochs.
    """
    sizes = [4 * size for size in SIZES]
    choices: dict[str, Any] = {
        "module": noisy_model(),
        "sizes": sizes,
        "data": tiny_data(sum(sizes), torch.float32),
        "schedule": Cosine(0.1),
        "batch_size": "all" if name == "fedsgd" else 10,
        "round": RoundOptions(steps=1 if name == "fedsgd" else 3),
    }
    return choices if name == "sync" else choices | {"client_sampling": UniformSampler(5 if name == "krum" else 4)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(8)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, noisy_choices(name), tmp_path)


def run_rounds_in_blocks(*arguments: Any) -> Records:
    """Call `run_rounds` with vectors of several blocks, as models of more than half a million parameters have."""
    with patch.object(flat, "BLOCK", 16):
        return run_rounds(*arguments)


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.quick_rows(4)
def test_it_is_so_in_several_blocks(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, {}, tmp_path, run_rounds_in_blocks)


@pytest.mark.parametrize("server", [adam, partial(FedOpt, lr=0.05, rule="adam")], ids=["adam", "fedadam"])
def test_it_is_so_where_fragments_have_moved_differently_often(ranks, server: Any, tmp_path: Path):
    """Of three fragments two have moved when the run is interrupted."""
    algorithm = Streaming(server=server, fragments=3, overlap_steps=1)
    assert_bit_equal(ranks(2), "streaming", 2, {"algorithm": algorithm}, tmp_path, run_rounds_in_blocks)


@pytest.mark.parametrize("name", ["diloco", "local"])
def test_it_is_so_with_replicas(ranks, name: str, tmp_path: Path):
    """Silos of 2 and of 2 ranks."""
    assert_bit_equal(ranks(4), name, [2, 2], noisy_choices(name), tmp_path)


def text_choices(dropout: float) -> dict[str, Any]:
    """Return a small GPT and random text."""
    torch.manual_seed(0)
    return {
        "module": GPT(vocabulary=64, length=16, layers=2, heads=2, width=32, dropout=dropout),
        "data": make_data("gpt", sum(SIZES)),
        "task": make_task("gpt"),
        "clients": make_clients(SIZES),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
    }


@pytest.mark.parametrize("name", ["sync", "diloco"])
def test_it_is_so_for_a_gpt_with_dropout(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, text_choices(0.2), tmp_path)


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_it_is_so_on_three_replicas(ranks, model: str, tmp_path: Path):
    """From 3 ranks on, the first backward pass of DistributedDataParallel adds in another order than the later ones."""
    choices = text_choices(0.0) | {"module": make_model(model), "data": make_data(model, sum(SIZES))}
    assert_bit_equal(ranks(3), "sync", 1, choices | {"task": make_task(model), "batch_size": 6}, tmp_path)


@pytest.mark.parametrize(
    "make", [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam, Muon, Countdown, OwnRate, Attribute, Lists]
)
@pytest.mark.quick_rows(4)
def test_it_is_so_for_every_optimizer_and_its_groups(ranks, make: type[torch.optim.Optimizer], tmp_path: Path):
    """Every client keeps the state, with three learning rates and no decay of biases."""
    rates = (("^0.weight", 0.5), ("^4", 2.0))
    decays = "weight_decay" in signature(make).parameters
    factory = partial(make, lr=0.01, weight_decay=0.1) if decays else partial(make, lr=0.01)
    choices = noisy_choices("diloco") | {"optimizer": GroupedOptimizerFactory(factory, decays, rates)}
    assert_bit_equal(ranks(2), "diloco", 2, choices, tmp_path)


def resumed_elsewhere(name: str, silos: SiloSpec, choices: dict[str, Any], saved: SavedState) -> dict[str, Any]:
    """Return the model after the run was resumed here from a checkpoint of another world."""
    with distributed(silos) as topology:
        run = case_run(topology, name, {"rounds": ROUNDS} | choices)
        return leaves(fit(run, resume_point=ResumePoint(INTERRUPTED, saved)).model.state_dict())


def test_kept_states_find_their_clients_in_other_silos(ranks, tmp_path: Path):
    """DiLoCo, saved by 2 silos: 1 silo of 1 and 4 silos continue as the 2 would, except for the order of sums."""
    choices: dict[str, Any] = {"client_sampling": UniformSampler(4), "round": RoundOptions(steps=3)}
    (first, _), (through, _) = interrupted_and_not(ranks(2), "diloco", 2, choices, tmp_path)
    expected = leaves(round_checkpoint(through, ROUNDS).load("model"))
    saved = round_checkpoint(first, INTERRUPTED)
    for size in (1, 4):
        assert_close(ranks(size).run(resumed_elsewhere, "diloco", size, choices, saved)[0], expected, 1e-11)


def other_algorithms_choices() -> dict[str, Any]:
    """Return choices with a personal output layer, which is state of the clients."""
    algorithm = FedAvg(server=partial(torch.optim.SGD, lr=1.0), shared_params="^0\\.", client_optimizer_state="keep")
    return noisy_choices("fedavg") | {"algorithm": algorithm, "optimizer": partial(torch.optim.AdamW, lr=0.01)}


def test_personal_tensors_are_kept(ranks, tmp_path: Path):
    """FedAvg shares only the first layer; batch statistics and the output layer are personal."""
    assert_bit_equal(ranks(2), "fedavg", 2, other_algorithms_choices(), tmp_path)
