"""A model in parts begins with the values that one rank has made, and no other rank ever holds it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.runs import make_run
from trainer.algorithms import FedAvg
from trainer.distributed.options import SiloOptions
from trainer.distributed.parallel_dims import ShardSpec
from trainer.distributed.sharding import initial_device, parallelize
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loop.train_state import TrainState
from trainer.models import GPT
from trainer.models.boxes import Box
from trainer.models.flat import FlatModel


def tied_gpt() -> nn.Module:
    return GPT(vocabulary=64, length=16, layers=2, heads=2, width=32)


class Frozen(nn.Module):
    """Frozen parameters, buffers of both kinds and one of two names, a layer of fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 12)
        self.base.weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)
        self.register_buffer("scale", torch.rand(12), persistent=False)
        self.head.register_buffer("same_scale", self.get_buffer("scale"), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.base(inputs)) * self.scale)


Parts = dict[str, tuple[Box, Tensor]]


def started(model: str, make: Any, silos: SiloSpec, shard: ShardSpec) -> tuple[Parts, dict[str, Tensor]]:
    """Start a run; return this rank's boxes of the model, and all other tensors."""
    with distributed(silos, shard=shard, device="cpu") as topology:
        sizes = [8] * topology.num_silos
        run = make_run(topology, sizes, model, algorithm=FedAvg())
        object.__setattr__(run, "model", make)
        state = TrainState(run)
        boxes = {n: (state.model.boxes[n], p.detach().clone()) for n, p in state.model.named_trainable}
        others = {n: state.model.storage.local(t).clone() for n, t in state.model.module.named_buffers()}
        frozen = {n: t.clone() for n, t in state.model.frozen.items()}
        return boxes, others | frozen


@pytest.mark.parametrize("cut", [(1, "full"), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("model", ["gpt", "mlp"])
def test_it_is_the_model_that_a_rank_alone_would_make(ranks, model: str, cut: tuple[SiloSpec, ShardSpec]):
    make = tied_gpt if model == "gpt" else Frozen
    ((whole, others),) = ranks(1).run(started, model, make, 1, 1)
    for parts, here in ranks(4).run(started, model, make, *cut):
        for name, (box, values) in parts.items():
            assert torch.equal(values, whole[name][1][box.slices]), name
        for name, tensor in here.items():
            if tensor.shape == others[name].shape:
                assert torch.equal(tensor, others[name]), name


class Stray(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.mask = torch.ones(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.mask


def refused() -> str:
    with distributed(1, shard=2, device="cpu") as topology:
        run = make_run(topology, [8], "mlp")
        object.__setattr__(run, "model", Stray)
        if topology.rank == 0:
            return ""
        try:
            with initial_device(topology):
                run.validate_model(run.make_model())
        except ValueError as error:
            return str(error)
        return "not refused"


def test_tensors_that_would_have_no_values_are_named(ranks):
    _, message = ranks(2).run(refused)
    assert "mask, which are neither parameters nor buffers" in message and "register_buffer" in message


def moved() -> str:
    with distributed(1, shard=2, device="cpu") as topology:
        parallel = parallelize(nn.Linear(8, 4), topology, SiloOptions())
        FlatModel(parallel.module, storage=parallel)
        parallel.take_gradients()  # all is where it was bound
        other = parallelize(nn.Linear(8, 4), topology, SiloOptions())
        FlatModel(other.module, storage=other)
        for part in other._parts.values():
            part._sharded_param_data = part._sharded_param_data.clone()
        try:
            other.take_gradients()
        except RuntimeError as error:
            return str(error)
        return ""


def test_parts_that_torch_keeps_elsewhere_are_noticed(ranks):
    for message in ranks(2).run(moved):
        assert f"torch {torch.__version__} keeps the parts of parameters elsewhere" in message
