"""The model on disk is the one that was evaluated, for every algorithm and compression, also with fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.laws.cases import COMBINED, SIZES, Records, assert_same, case_run, leaves, nesterov, tiny_data, tiny_model
from trainer.algorithms import Streaming
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.format import find_saved
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.compression import Cast, Int4, Int8, PowerSGD, TopK, Uncompressed, UpdateCompression
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit

ROUNDS = 2
COMPRESSIONS: dict[str, UpdateCompression] = {
    "fp32": Uncompressed(),
    "int8": Int8(8),
    "topk": TopK(0.5),
    "bf16": Cast("bfloat16"),
    "int4": Int4(8),
    "powersgd": PowerSGD(1),
}
# In round 2 clients begin that were not in round 1, while the sum of round 1 is still under way.
STREAMS = {
    "two fragments": Streaming(server=nesterov, fragments=2, overlap_steps=2, alpha=0.5),
    "one fragment": Streaming(server=nesterov, overlap_steps=1),
}
Evaluated = list[tuple[float, dict[str, Any]]]


def train(name: str, compression: str, personal_steps: int, folder: Path) -> Evaluated | None:
    """Return the loss and the saved model of each round; None if the algorithm cannot be compressed."""
    choices: dict[str, Any] = {"rounds": ROUNDS, "eval.personal_steps": personal_steps}
    if compression != "fp32":
        choices["update_compression"] = COMPRESSIONS[compression]
    if name in STREAMS:
        choices |= {"algorithm": STREAMS[name], "client_sampling": UniformSampler(4)}
    with distributed(2) as topology:
        try:
            run = case_run(topology, "streaming" if name in STREAMS else name, choices)
        except ValueError:
            return None
        records = Records()
        fit(run, [records], Checkpointer(folder, topology, run.assignment_digest))
        losses = [metrics["test/loss"] for metrics in records.rounds]
    return [(loss, saved_model(folder, rounds)) for rounds, loss in enumerate(losses, 1)]


def saved_model(folder: Path, rounds: int) -> dict[str, Any]:
    saved = find_saved(folder / f"round-{rounds:06d}")
    assert saved
    return leaves(saved.load("model"))


def loss_of(state: dict[str, Any]) -> float:
    model = tiny_model().double()
    model.load_state_dict(state)
    inputs, targets = tiny_data(sum(SIZES)).test.fetch(torch.arange(21))
    return F.cross_entropy(model(inputs), targets).item()


@pytest.mark.parametrize("name", [*COMBINED, *STREAMS])
@pytest.mark.parametrize("compression", ["fp32", "int8"])
@pytest.mark.quick_rows(14)
def test_the_saved_model_is_the_evaluated_one(ranks, name: str, compression: str, tmp_path: Path):
    """With clients that are fine-tuned for the evaluation: its loss by plain torch is `test/loss`, in every round."""
    for evaluated in ranks(2).run(train, name, compression, 2, tmp_path):
        for loss, state in evaluated or []:
            assert loss_of(state) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("compression", ["topk", "bf16", "int4", "powersgd"])
def test_it_is_so_with_every_compression(ranks, compression: str, tmp_path: Path):
    for evaluated in ranks(2).run(train, "fedavg", compression, 2, tmp_path):
        for loss, state in evaluated:
            assert loss_of(state) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("name", ["fedavg_adam", "scaffold", *STREAMS])
@pytest.mark.parametrize("compression", ["fp32", "int8"])
@pytest.mark.quick_rows(4)
def test_fine_tuning_changes_no_bit_of_the_model(ranks, name: str, compression: str, tmp_path: Path):
    tuned, untouched = (ranks(2).run(train, name, compression, steps, tmp_path / str(steps))[0] for steps in (2, 0))
    assert_same(tuned[-1][1], untouched[-1][1])
