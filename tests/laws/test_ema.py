"""The average of the weights is its definition by hand, after every move of the global weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import (
    CASES,
    SIZES,
    TEST_EXAMPLES,
    Only,
    Records,
    assert_close,
    assert_same,
    case_run,
    figures,
    leaves,
    silos_of,
    tiny_data,
    tiny_model,
)
from tests.laws.test_batch_statistics import norm_choices
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import assert_bit_equal, noisy_choices, round_checkpoint, timeless
from trainer.algorithms import FedAvg
from trainer.checkpoint import Checkpointer
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.models.flat import FlatModel
from trainer.optim.ema import ExponentialMovingAverage

DECAY, ROUNDS = 0.7, 4
MOVING = [name for name in CASES if name != "local"]


def run_all(name: str, silos: SiloSpec, choices: dict[str, Any], folder: Path) -> Records:
    """Train, and keep the round checkpoint of every round."""
    with distributed(silos_of(name, silos)) as topology:
        run, records = case_run(topology, name, {"rounds": ROUNDS, "ema_decay": DECAY} | choices), Records()
        fit(run, [records], Checkpointer(folder, topology, run.assignment_digest, keep=ROUNDS))
        return records


def weights(folder: Path, rounds: int, section: str = "model") -> dict[str, Tensor]:
    """Return the tensors of a section by name; their order depends on which replica writes them."""
    return dict(sorted(leaves(round_checkpoint(folder, rounds).load(section)).items()))


def averaged_by_hand(first: dict[str, Tensor], moves: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return average <- decay average + (1 - decay) weights, one tensor after the other."""
    average = {name: tensor.detach().double() for name, tensor in first.items()}
    for weights in moves:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name].double() for name in average}
    return average


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.quick_rows(7)
def test_it_is_the_definition(ranks, name: str, tmp_path: Path):
    """Rounds have one step, so that in sync too there is a round checkpoint after every move."""
    first = dict(tiny_model().double().named_parameters())
    ranks(2).run(run_all, name, 2, {"round": RoundOptions(steps=1)}, tmp_path)
    moves = [weights(tmp_path, rounds) for rounds in range(1, ROUNDS + 1)]
    ours = weights(tmp_path, ROUNDS, "ema")
    assert_close(ours, averaged_by_hand(first, moves), 1e-12)
    assert not torch.equal(ours["0.weight"], moves[-1]["0.weight"])


def test_in_sync_it_goes_by_steps_and_not_by_rounds(ranks, tmp_path: Path):
    """Four steps in one round, or one in each of four, give the same bits, with 3 replicas."""
    for path, rounds in ((tmp_path / "one", 1), (tmp_path / "four", ROUNDS)):
        choices = {"round": RoundOptions(steps=ROUNDS // rounds), "rounds": rounds}
        ranks(3).run(run_all, "sync", 1, choices, path)
    assert_same(weights(tmp_path / "one", 1, "ema"), weights(tmp_path / "four", ROUNDS, "ema"))


def test_a_round_without_clients_moves_nothing(ranks, tmp_path: Path):
    ranks(2).run(run_all, "fedavg", 2, {"client_sampling": Only(((0, 1), ()))}, tmp_path)
    first, last = (weights(tmp_path, rounds, "ema") for rounds in (1, ROUNDS))
    assert_same(last, first)
    assert not torch.equal(first["0.weight"], weights(tmp_path, 1)["0.weight"])


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_it_is_judged_and_changes_nothing(ranks, name: str, tmp_path: Path):
    """Accuracy and loss are those of a model with the averages; everything else is the same as without them."""
    ours = ranks(2).run(run_all, name, 2, {}, tmp_path / "ours")[0]
    theirs = ranks(2).run(run_all, name, 2, {"ema_decay": None}, tmp_path / "theirs")[0]
    assert_same(weights(tmp_path / "ours", ROUNDS), weights(tmp_path / "theirs", ROUNDS))
    for one, other in zip(ours.rounds, theirs.rounds, strict=True):
        assert_same({key: value for key, value in timeless(one).items() if "ema" not in key}, timeless(other))
    model = tiny_model().double()
    model.load_state_dict(weights(tmp_path / "ours", ROUNDS, "ema"))
    inputs, targets = tiny_data(sum(SIZES)).test.fetch(torch.arange(TEST_EXAMPLES))
    reported, outputs = figures(ours.rounds[-1]), model(inputs)
    assert reported["ema/accuracy"] == pytest.approx(outputs.argmax(1).eq(targets).double().mean().item())
    assert reported["ema/loss"] == pytest.approx(nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6)
    assert reported["ema/loss"] != reported["test/loss"]


@pytest.mark.parametrize("name", ["sync", "fedavg_adam", "streaming"])
def test_a_resumed_run_goes_on_with_it(ranks, name: str, tmp_path: Path):
    assert_bit_equal(ranks(2), name, 2, noisy_choices(name) | {"ema_decay": DECAY}, tmp_path)


@pytest.mark.parametrize("name", ["sync", "diloco"])
def test_it_does_so_from_the_middle_of_a_round(ranks, name: str, tmp_path: Path):
    choices = noisy_choices(name) | {"ema_decay": DECAY, "checkpoint.every_rounds": 3}
    assert_left_and_bit_equal(ranks(2), name, 2, choices, tmp_path, {0: (0, 2)})


def test_statistics_are_the_models_own_and_personal_layers_too(ranks, tmp_path: Path):
    """In FedBN personal tensors have no average. Clients are evaluated with the average and their personal layers."""
    algorithm = FedAvg(server=partial(torch.optim.SGD, lr=1.0), shared_params=r"^[04]\.")
    records = ranks(2).run(run_all, "fedavg", 2, noisy_choices("fedavg") | {"algorithm": algorithm}, tmp_path)[0]
    assert set(weights(tmp_path, ROUNDS, "ema")) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert {f"client/{client}/ema_accuracy" for client in range(len(SIZES))} <= set(records.rounds[-1])


def test_buffers_have_no_average(ranks, tmp_path: Path):
    ranks(2).run(run_all, "fedavg", 2, norm_choices(), tmp_path)
    missing = set(weights(tmp_path, ROUNDS)) - set(weights(tmp_path, ROUNDS, "ema"))
    assert missing and all("running" in name or "num_batches" in name for name in missing)


def test_half_precision_is_averaged_in_float32_and_put_back():
    model = FlatModel(tiny_model().to(torch.bfloat16))
    average, before = ExponentialMovingAverage(model, 0.999), model.shared.clone()
    model.shared += 1
    moved = model.shared.clone()
    average.update()
    expected = before.float() + 0.001 * (moved.float() - before.float())
    torch.testing.assert_close(average.vector, expected, rtol=1e-6, atol=0)
    with average.swapped_in():
        assert torch.equal(model.shared, average.vector.to(torch.bfloat16))
    assert torch.equal(model.shared, moved)


def test_tied_parameters_have_all_their_names():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    average = ExponentialMovingAverage(FlatModel(module), DECAY)
    assert average.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(average.state_dict()["1.weight"], module[0].weight)
