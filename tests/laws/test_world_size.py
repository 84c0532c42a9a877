"""A silo takes the same batches on any number of ranks, with the same losses, gradients and parameters.

In float64 only 1e-12 is left of the order of sums; one rank is the reference for 2, 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import TEST_EXAMPLES, Records, assert_close, figures, leaves, tiny_data, tiny_model
from tests.support.runs import make_clients, make_data, make_model, make_run
from trainer.data import DataSplits
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.loop.options import ClipOptions
from trainer.loop.run import Run
from trainer.utils.seeding import generator


@dataclass(frozen=True)
class Batches:
    """The number of examples, and the batch sizes."""

    examples: int
    batch_size: int | Literal["all"]
    choices: dict[str, Any] = field(default_factory=dict)


BATCHES = {
    "even": Batches(24, 12),
    # The last batch has 2 examples: of 3 ranks one has none of them, of 4 two.
    "ragged": Batches(26, 12),
    "one_left": Batches(25, 12),
    "all": Batches(25, "all"),
    # 4 ranks get 2, 3, 2, 3 examples: one micro-batch and two.
    "micro": Batches(26, 10, {"micro_batch_size": 2}),
    "micro_of_one": Batches(23, 11, {"micro_batch_size": 1}),
    "clipped": Batches(26, 12, {"clip": ClipOptions(0.05)}),
}


def double_run(topology: Topology, model: str, batches: Batches, **choices: Any) -> Run:
    """Return a float64 run over two epochs, unless `choices` override it."""
    defaults: dict[str, Any] = {"batch_size": batches.batch_size, "rounds": 2, "eval.batch_size": 5}
    defaults |= {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9)} | batches.choices
    if model == "gpt":
        defaults |= {"module": make_model("gpt").double(), "data": make_data("gpt", batches.examples)}
    else:
        clients = make_clients([batches.examples], TEST_EXAMPLES)
        defaults |= {"module": tiny_model().double(), "data": tiny_data(batches.examples), "clients": clients}
    return make_run(topology, [batches.examples], model, **(defaults | choices))


def train_on(model: str, batches: Batches) -> tuple[dict[str, Any], list[Metrics]]:
    """Return parameters and metrics of two synchronous epochs on all ranks."""
    with distributed() as topology:
        run = double_run(topology, model, batches)
        records = Records()
        return leaves(fit(run, [records]).model.state_dict()), records.rounds


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("model", ["mlp", "gpt"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.quick_rows(8)
def test_ranks_are_one_rank(ranks, size: int, model: str, batches: str):
    ((parameters, rounds),) = ranks(1).run(train_on, model, BATCHES[batches])
    for ours, our_rounds in ranks(size).run(train_on, model, BATCHES[batches]):
        assert_close(ours, parameters, 1e-10 if model == "gpt" else 1e-12)
        for our_round, their_round in zip(our_rounds, rounds, strict=True):
            assert figures(our_round) == pytest.approx(figures(their_round), rel=1e-8, nan_ok=True)


def by_hand(size: int | Literal["all"]) -> dict[str, Any]:
    """Train one epoch of plain torch over 26 examples with the GPT, in the loader's order, with mean losses."""
    model = make_model("gpt").double()
    inputs, targets = make_data("gpt", 26).train.fetch(torch.arange(26))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for ids in torch.randperm(26, generator=generator(0, "order", 0, 0)).split(26 if size == "all" else size):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[ids]).flatten(0, 1), targets[ids].flatten()).backward()
        optimizer.step()
    return leaves(model.state_dict())


def one_epoch(size: int | Literal["all"], micro: int | None) -> dict[str, Any]:
    with distributed() as topology:
        optimizer = partial(torch.optim.SGD, lr=0.2)
        run = double_run(topology, "gpt", Batches(26, size), rounds=1, micro_batch_size=micro, optimizer=optimizer)
        return leaves(fit(run).model.state_dict())


@pytest.mark.parametrize(("size", "micro"), [(12, None), (12, 2), ("all", 3)])
def test_ragged_batches_and_accumulation_are_exact(ranks, size: int | Literal["all"], micro: int | None):
    """Three ranks equal a loop that knows neither ranks nor micro-batches."""
    for ours in ranks(3).run(one_epoch, size, micro):
        assert_close(ours, by_hand(size), 1e-10)


class Watched:
    """A callback that asks for the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int, float]] = []

    def __call__(self, done: float, examples: int, loss: Callable[[], float]) -> None:
        self.seen.append((done, examples, loss()))


def watch_steps(batches: Batches) -> list[tuple[float, int, float]]:
    with distributed() as topology:
        watched = Watched()
        fit(double_run(topology, "mlp", batches), on_step=watched)
        return watched.seen


def test_any_rank_can_be_asked_for_the_loss_of_any_step(ranks):
    """A rank may have no example of the step: the last batch has 2, for 3 ranks. Progress runs from 0 to 1."""
    for seen in ranks(3).run(watch_steps, Batches(26, 12)):
        assert [examples for _, examples, _ in seen] == [12, 12, 2] * 2
        assert [done for done, _, _ in seen] == pytest.approx([step / 6 for step in range(1, 7)])


def evaluate_split(data: DataSplits, batch_size: int) -> Metrics:
    """Return the untrained model's metrics on the test set."""
    with distributed() as topology:
        choices = {"data": data, "eval.batch_size": batch_size, "optimizer": partial(torch.optim.SGD, lr=0.0)}
        return fit(double_run(topology, "mlp", Batches(26, 12), **choices)).metrics


@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluation_is_exact(ranks, size: int):
    """21 test examples on any number of ranks, without padding: the plain mean over them."""
    data, model = tiny_data(26), tiny_model().double()
    inputs, targets = data.test.fetch(torch.arange(21))
    outputs: Tensor = model(inputs)
    loss = nn.functional.cross_entropy(outputs, targets).item()
    accuracy = outputs.argmax(1).eq(targets).double().mean().item()
    for batch_size in (2, 1000):
        for metrics in ranks(size).run(evaluate_split, data, batch_size):
            assert metrics["test/loss"] == pytest.approx(loss, rel=1e-6)
            assert metrics["test/accuracy"] == pytest.approx(accuracy, rel=1e-12)


def perplexity_of_untrained() -> Metrics:
    with distributed() as topology:
        return fit(double_run(topology, "gpt", Batches(26, 12), optimizer=partial(torch.optim.SGD, lr=0.0))).metrics


def test_perplexity_is_of_tokens(ranks):
    """It is exp of the mean loss over the 8 x 16 tokens of the test windows."""
    inputs, targets = make_data("gpt", 26).test.fetch(torch.arange(8))
    outputs = make_model("gpt").double()(inputs)
    loss = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    for metrics in ranks(3).run(perplexity_of_untrained):
        assert metrics["test/loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics["test/perplexity"] == pytest.approx(loss.exp().item(), rel=1e-6)
