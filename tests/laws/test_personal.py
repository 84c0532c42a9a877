"""Personal parameters: newcomers begin with the average; models are evaluated before and after personal steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.laws.cases import SIZES, Only, Records, assert_close, assert_same, case_run, leaves, tiny_data, tiny_model
from trainer.algorithms import FedAvg
from trainer.checkpoint import Checkpointer
from trainer.data import DataSplits
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import Metrics
from trainer.loop.evaluate import evaluate
from trainer.loop.fit import fit
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.utils.seeding import generator

RATE, STEPS, BATCH_SIZE = 0.3, 3, 4
HEAD = "^0\\."  # the first layer is shared, the second personal


def personal_run(topology: Topology, **choices: Any) -> Run:
    defaults = {"algorithm": FedAvg(shared_params=HEAD), "client_sampling": Only(((0, 1, 4), (0, 2), (3, 5, 6)))}
    return case_run(topology, "fedavg", defaults | {"rounds": 3} | choices)


def heads_and_fresh(silos: SiloSpec) -> tuple[dict[int, Tensor], Tensor]:
    """Return the personal vectors after the second round, and the initial ones of newcomers in the third."""
    with distributed(silos) as topology:
        run = personal_run(topology)
        state = TrainState(run)
        for index in range(2):
            train_round(state, run.sample_round(index))
        heads = {
            client: kept["personal"]["parameters"].clone() for client, kept in state.trainer.clients.states.items()
        }
        state.init_new_clients(run.sample_round(2))
        return heads, state.trainer.clients.initial_personal_state["parameters"]


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
def test_newcomers_begin_with_the_average(ranks, silos: SiloSpec):
    """The average is over the clients that have trained, weighted by n_k, in all silos; all ranks have the same."""
    outcomes = ranks(2 if silos == 2 else 4).run(heads_and_fresh, silos)
    heads = {client: head for mine, _ in outcomes for client, head in mine.items()}
    assert sorted(heads) == [0, 1, 2, 4]
    total = sum(SIZES[client] for client in heads)
    expected = torch.stack([head * (SIZES[client] / total) for client, head in heads.items()]).sum(0)
    for _, fresh in outcomes:
        torch.testing.assert_close(fresh, expected, rtol=1e-13, atol=1e-14)
        assert torch.equal(fresh, outcomes[0][1])


def judged(silos: SiloSpec) -> tuple[Metrics, dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the metrics of one round of all clients, their second layers by name, and the shared first one."""
    with distributed(silos) as topology:
        run = personal_run(topology, client_sampling=Only((tuple(range(7)),)))
        state = TrainState(run)
        train_round(state, run.sample_round(0))
        figures = evaluate(state)
        assert figures
        heads = {}
        for client in state.trainer.clients.states:
            state.trainer.load_personal(client)
            heads[client] = {
                name: t.clone() for name, t in state.model.module.state_dict().items() if name.startswith("2.")
            }
        return figures, heads, state.model.shared_state()


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
def test_the_average_model_is_judged_beside_the_clients_own(ranks, silos: SiloSpec):
    """It has the average that newcomers get; its metrics are those of a model assembled by hand."""
    outcomes = ranks(2 if silos == 2 else 4).run(judged, silos)
    heads = {client: head for _, mine, _ in outcomes for client, head in mine.items()}
    model = tiny_model().double()
    mean = {name: sum(heads[c][name] * SIZES[c] for c in heads) / sum(SIZES) for name in heads[0]}
    model.load_state_dict(outcomes[0][2] | mean)
    inputs, targets = tiny_data(sum(SIZES)).test.fetch(torch.arange(21))
    for figures, _, _ in outcomes:
        assert figures["global/loss"] == pytest.approx(F.cross_entropy(model(inputs), targets).item(), rel=1e-12)
        assert figures["global/loss"] != figures["test/loss"]
        reported = ["worst_accuracy", "accuracy_std", "jain"]
        assert {f"global/{name}" for name in reported} | {f"clients/{name}" for name in reported} <= set(figures)


def tuned_by_hand(shared: dict[str, Tensor], data: DataSplits, client: int, sizes: list[int]) -> nn.Module:
    """Return the global model after a client's first batches, by plain torch."""
    model = tiny_model().double()
    model.load_state_dict(shared)
    first = sum(sizes[:client])
    inputs, targets = data.train.fetch(torch.arange(first, first + sizes[client]))
    optimizer, taken, epoch = torch.optim.SGD(model.parameters(), lr=RATE), 0, 0
    while taken < STEPS:
        order = torch.randperm(sizes[client], generator=generator(0, "order", client, epoch))
        for ids in order.split(BATCH_SIZE)[: STEPS - taken]:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            optimizer.step()
            taken += 1
        epoch += 1
    return model


def tuned_figures(
    silos: SiloSpec, personal_steps: int, folder: Path | None = None
) -> tuple[Metrics, dict[str, Tensor]]:
    with distributed(silos) as topology:
        choices = {"optimizer": partial(torch.optim.SGD, lr=RATE), "eval.personal_steps": personal_steps}
        run, records = case_run(topology, "fedavg", choices), Records()
        result = fit(run, [records], Checkpointer(folder, topology, run.assignment_digest) if folder else None)
        return records.rounds[-1], leaves(result.model.state_dict())


@pytest.mark.parametrize("silos", [2, [3, 1]], ids=["2", "3+1"])
def test_personal_models_are_the_global_one_and_some_steps(ranks, silos: SiloSpec):
    """Each client's accuracy, with and without its steps, is that of a plain loop; the global model is unchanged."""
    for figures, model in ranks(2 if silos == 2 else 4).run(tuned_figures, silos, STEPS):
        data = tiny_data(sum(SIZES))
        for client in range(len(SIZES)):
            inputs, targets = data.test.fetch(torch.arange(client, 21, len(SIZES)))
            tuned = tuned_by_hand(model, data, client, SIZES)
            accuracy = tuned(inputs).argmax(1).eq(targets).double().mean().item()
            assert figures[f"client/{client}/personal_accuracy"] == pytest.approx(accuracy)
        reported = {name.removeprefix("personal/") for name in figures if name.startswith("personal/")}
        scores = {"loss", "accuracy", "macro_f1", "sensitivity", "specificity", "calibration_error"}
        assert reported == scores | {"worst_accuracy", "accuracy_std", "jain"}


def test_judging_personal_models_changes_nothing(ranks):
    """Model and metrics equal those of a run without personal evaluation."""
    with_them = ranks(2).run(tuned_figures, 2, STEPS)[0]
    without = ranks(2).run(tuned_figures, 2, 0)[0]
    assert_same(with_them[1], without[1])
    same = {name: with_them[0][name] for name in without[0] if name.startswith(("test/", "train/", "delta/"))}
    assert_close(same, {name: without[0][name] for name in same}, 0)


def resumed(folder: Path, until: int, name: str) -> dict[str, Any]:
    """Return the model of a run of 4 rounds on silos of 2 and 1 ranks, stopped and resumed at `until`."""
    with distributed([2, 1]) as topology:
        algorithm = FedAvg(shared_params=HEAD) if name == "personal" else FedAvg()
        choices: dict[str, Any] = {"algorithm": algorithm, "rounds": 4, "eval.personal_steps": 2}
        choices |= {"client_sampling": Only(((0, 1), (0, 2), (3, 5), (4, 6))), "sizes": [8 * size for size in SIZES]}
        choices |= {"data": tiny_data(8 * sum(SIZES), torch.float32), "module": tiny_model()}
        run = case_run(topology, "fedavg", choices)
        for end in (until, 4):
            checkpoints = Checkpointer(folder, topology, run.assignment_digest)
            result = fit(run, (), checkpoints, checkpoints.latest(), until=end)
        return leaves(result.model.state_dict())


@pytest.mark.parametrize("name", ["personal", "global"])
@pytest.mark.quick_rows(1)
def test_a_resumed_run_has_the_same_bits(ranks, tmp_path: Path, name: str):
    """With newcomers in every round, silos without a client at first, and evaluations of personal models in between."""
    pool = ranks(3)
    through = pool.run(resumed, tmp_path / "through", 4, name)
    for until in (1, 2):
        for ours, theirs in zip(pool.run(resumed, tmp_path / str(until), until, name), through, strict=True):
            assert_same(ours, theirs)
