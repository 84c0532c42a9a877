"""Synchronous training equals a hand-written DistributedDataParallel loop bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scripts.bench import ddp_baseline
from tests.support.runs import loss_function, make_data, make_model, make_run, parameters
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.utils.seeding import generator

STEPS = 50
EXAMPLES_PER_RANK = 4
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


def both(model: str, optimizer: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the parameters after 50 steps of ours and of the hand-written loop, from one start and in one order."""
    with distributed() as topology:
        batch_size = EXAMPLES_PER_RANK * topology.world_size
        examples = batch_size * 10
        choices = {"optimizer": OPTIMIZERS[optimizer], "batch_size": batch_size, "round": RoundOptions(steps=STEPS)}
        run = make_run(topology, [examples], model, **choices)
        trained = fit(run).model
        module = make_model(model)
        inputs, targets = make_data(model, examples).train.fetch(torch.arange(examples))
        wrapped, step = ddp_baseline.wrap(module), OPTIMIZERS[optimizer](module.parameters())
        for epoch in range(STEPS // 10):
            order = torch.randperm(examples, generator=generator(0, "order", 0, epoch))
            batches = ddp_baseline.shares(order, batch_size)
            ddp_baseline.steps(wrapped, step, loss_function(model), inputs, targets, batches)
    return parameters(trained), parameters(module)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "cnn", "gpt"])
@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.quick_rows(5)
def test_sync_is_the_handwritten_loop(ranks, size: int, model: str, optimizer: str):
    for ours, theirs in ranks(size).run(both, model, optimizer):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
