"""A model whose layers are divided over ranks trains as the whole model does, and what cannot be divided is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from tests.support.transformers import make_llama
from trainer.distributed.options import SiloOptions
from trainer.distributed.sharding import parallelize
from trainer.distributed.topology import distributed
from trainer.models import GPT, MLP, ViT, from_transformers
from trainer.models.boxes import Box
from trainer.models.flat import FlatModel

LENGTH, EXAMPLES, STEPS = 8, 4, 4


def make_gpt(**choices: Any) -> nn.Module:
    defaults: dict[str, Any] = {"vocabulary": 12, "length": LENGTH, "layers": 2, "heads": 4, "width": 16}
    return GPT(**defaults | choices)


class OwnPlan(nn.Module):
    """A model of the user's, whose plan has styles of torch."""

    def __init__(self):
        super().__init__()
        self.tp_plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        self.tokens = nn.Embedding(12, 16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.first(self.tokens(tokens)).relu())


def make_images(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.rand(EXAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": make_gpt,
    "gpt with a vocabulary that is not divided": partial(make_gpt, vocabulary=11),
    "vit": lambda: ViT(classes=12, size=8, patch=4, width=16, layers=2, heads=4),
    "llama": make_llama,
    "llama with tied ends": lambda: from_transformers(
        architecture="llama",
        config={"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": True}
        | {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen3, with norms of heads": lambda: from_transformers(
        architecture="qwen3",
        config={"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
        | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "plan of the user": OwnPlan,
}


@dataclass(frozen=True)
class Trained:
    """The parts that a rank has after training.

    Attributes:
        parameters: its region of each parameter, by name.
        boxes: the regions.
        whole: the whole model, trained by one process.
        repeated: the names of what other parts have too.
        parts: the index of the rank among those that divide parameters, and among those that divide layers.
    """

    parameters: dict[str, Tensor]
    boxes: dict[str, Box]
    whole: dict[str, Tensor]
    repeated: set[str]
    parts: tuple[int, int]


def train(name: str, shard: int, tensor: int, dtype: torch.dtype) -> Trained:
    """Make steps of AdamW, on a part of the model and on the whole; each rank calls this."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = MODELS[name]().to(dtype)
    module = copy.deepcopy(whole)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (EXAMPLES, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:]
    inputs = tokens[:, :-1]
    if name == "vit":
        inputs, targets = make_images(generator, dtype), tokens[:, 0]
    with distributed(device="cpu", shard=shard, tensor=tensor) as topology:
        parallel = parallelize(module, topology, SiloOptions(shard=shard, tensor=tensor))
        flat = FlatModel(module, storage=parallel)
        parallel.broadcast(lambda parameter: True)
        count = EXAMPLES // topology.num_replicas
        own = slice(topology.replica * count, (topology.replica + 1) * count)
        steps(module, inputs[own], targets[own], flat.trainable, parallel.take_gradients)
        steps(whole, inputs, targets, list(whole.parameters()), lambda: None)
        return Trained(
            {name: parameter.detach().clone() for name, parameter in flat.named_trainable},
            flat.boxes,
            {name: parameter.detach() for name, parameter in whole.named_parameters()},
            flat.repeated_names,
            (topology.shard_rank, topology.tensor_rank),
        )


def steps(
    module: nn.Module, inputs: Tensor, targets: Tensor, parameters: list[nn.Parameter], take: Callable[[], None]
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(STEPS):
        outputs = module(inputs)
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        take()
        optimizer.step()
        optimizer.zero_grad()


ROWS = [
    *((name, 1, 2) for name in MODELS),
    ("gpt", 1, 4),
    ("gpt", 2, 2),
    ("gpt with a vocabulary that is not divided", 2, 2),
    ("vit", 2, 2),
    ("vit", 1, 4),
    ("llama", 2, 2),
]


@pytest.mark.parametrize(("name", "shard", "tensor"), ROWS)
@pytest.mark.quick_rows(4)
def test_divided_layers_train_as_the_whole_model(ranks, name: str, shard: int, tensor: int):
    """Also tied ends, which torch unties silently, and copies of the model with other examples."""
    results = ranks(max(shard * tensor, 2)).run(train, name, shard, tensor, torch.float64)
    covered = {name: torch.zeros_like(parameter) for name, parameter in results[0].whole.items()}
    for rank in results:
        for name, parameter in rank.parameters.items():
            region = rank.boxes[name].slices
            torch.testing.assert_close(parameter, rank.whole[name][region], rtol=0, atol=1e-10)
            covered[name][region] = 1
    assert all(bool(each.all()) for each in covered.values())
    assert_repeated_are_equal(results)


def test_copies_of_a_divided_model(ranks):
    """Two copies of two parts."""
    for rank in ranks(4).run(train, "gpt", 1, 2, torch.float64):
        for name, parameter in rank.parameters.items():
            torch.testing.assert_close(parameter, rank.whole[name][rank.boxes[name].slices], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tensor", [2, 4])
def test_in_float32(ranks, tensor: int):
    for rank in ranks(tensor).run(train, "gpt", 1, tensor, torch.float32):
        for name, parameter in rank.parameters.items():
            torch.testing.assert_close(parameter, rank.whole[name][rank.boxes[name].slices], rtol=0, atol=1e-4)


def assert_repeated_are_equal(results: list[Trained]) -> None:
    """Assert that what several parts have is equal on them, bit for bit, without a message that makes it so."""
    assert any("norm" in name for name in results[0].repeated) or "tokens.weight" in results[0].repeated
    firsts = {rank.parts[0]: rank for rank in reversed(results)}
    for rank in results:
        for name in rank.repeated:
            assert torch.equal(rank.parameters[name], firsts[rank.parts[0]].parameters[name])


def few_keys() -> nn.Module:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    return from_transformers(architecture="llama", config=sizes | {"num_attention_heads": 4, "num_key_value_heads": 1})


def refusal(make: Callable[[], nn.Module]) -> str:
    """Divide a model over two ranks, and return why it cannot be."""
    with distributed(device="cpu", tensor=2) as topology, pytest.raises(ValueError, match=r"silo\.tensor") as caught:
        parallelize(make(), topology, SiloOptions(tensor=2))
    return str(caught.value)


class Planned(nn.Module):
    """A model with layers and a plan for them."""

    def __init__(self, plan: dict[str, Any], tied: bool = False):
        super().__init__()
        self.tp_plan = plan
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 7), nn.LayerNorm(8)
        self.third = nn.Linear(8, 8)
        if tied:
            self.third.weight = self.first.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MLP, "silo.tensor=2: model=MLP has no plan for tensor parallelism.\n  set silo.shard"),
        (partial(make_gpt, heads=1), "silo.tensor=2: model.heads=1 is not a multiple of it."),
        (few_keys, "silo.tensor=2: model.config.num_key_value_heads=1 is not a multiple of it."),
        (partial(Planned, {"first": "sideways"}), "styles that are not known here: sideways.\n  valid: colwise, "),
        (partial(Planned, {"layers.*": "colwise"}), "names none of its layers: layers.*.\n  valid: names of layers"),
        (partial(Planned, {"norm": "colwise"}), "names layers that cannot be cut: norm (LayerNorm)."),
        (
            partial(Planned, {"second": "colwise"}),
            "silo.tensor=2 does not divide second.weight [7, 8], second.bias [7]",
        ),
        (
            partial(Planned, {"first": "colwise", "third": "rowwise"}, tied=True),
            "cuts first.weight and third.weight differently, which are one parameter",
        ),
    ],
)
def test_models_that_cannot_be_divided_are_refused(ranks, make: Callable[[], nn.Module], message: str):
    assert message in ranks(2).run(refusal, make)[0]
