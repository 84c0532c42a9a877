"""Models, data and optimizers that users bring, and that a run takes or refuses before it trains."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from trainer.data import DataSplits, TensorSource

INPUTS, CLASSES, EXAMPLES, TESTS = 6, 3, 24, 8


def table(inputs: str = "float32", targets: str = "int64") -> DataSplits:
    """Return a table of three classes, its inputs and targets of these types."""
    numbers = torch.randn(EXAMPLES + TESTS, INPUTS, generator=torch.Generator().manual_seed(0))
    labels = numbers[:, :CLASSES].argmax(1).to(getattr(torch, targets))
    numbers = numbers.to(getattr(torch, inputs))
    cut = slice(EXAMPLES), slice(EXAMPLES, None)
    return DataSplits(*(TensorSource(numbers[part], labels[part]) for part in cut), classes=CLASSES)


def tokens(targets: str = "int64") -> DataSplits:
    """Return sequences of five tokens, and the tokens after them, of this type."""
    drawn = torch.randint(0, 11, (EXAMPLES + TESTS, 6), generator=torch.Generator().manual_seed(0))
    before, after = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous().to(getattr(torch, targets))
    cut = slice(EXAMPLES), slice(EXAMPLES, None)
    return DataSplits(*(TensorSource(before[part], after[part]) for part in cut), classes=11)


def load_with_a_fault(kind: str) -> DataSplits:
    """Fail while loading."""
    if kind == "type":
        return len(3)  # pyright: ignore
    if kind == "key":
        return {}["label"]
    raise AssertionError


class FaultyItems(Dataset[tuple[Tensor, int]]):
    """A data set whose items from some example on cannot be read."""

    def __init__(self, first_fault: int):
        self.first_fault = first_fault

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.first_fault:
            raise KeyError(f"row {index}")
        return torch.zeros(INPUTS), index % CLASSES


def faulty_items(first_fault: int) -> DataSplits:
    return DataSplits(FaultyItems(first_fault), FaultyItems(EXAMPLES), classes=CLASSES)


class Net(nn.Module):
    """Two layers; `spare` ones are made, and not used."""

    def __init__(self, spare: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 8), nn.Linear(8, CLASSES)
        self.spare = nn.Linear(INPUTS, CLASSES) if spare else None

    def forward(self, inputs: Tensor) -> Any:
        return self.second(F.relu(self.first(inputs)))


class Outputs(NamedTuple):
    features: Tensor
    logits: Tensor


class Several(Net):
    """Returns several outputs in a container."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, inputs: Tensor) -> Any:
        features = F.relu(self.first(inputs))
        logits = self.second(features)
        containers = {
            "dict": lambda: {"features": features, "logits": logits},
            "tuple": lambda: (features, logits),
            "list": lambda: [features, logits],
            "named": lambda: Outputs(features, logits),
            "none": lambda: None,
        }
        return containers[self.kind]()


class Sometimes(Net):
    """Uses its spare layer in every other batch, or on every other rank."""

    def __init__(self, by: str):
        super().__init__(spare=True)
        self.by, self.calls = by, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        outputs = super().forward(inputs)
        uses = self.calls % 2 if self.by == "batch" else torch.distributed.get_rank() % 2
        assert self.spare
        return outputs + self.spare(inputs) if uses else outputs


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(INPUTS, CLASSES, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.weight).real


class TwoTypes(Net):
    """Its second layer is float64."""

    def __init__(self):
        super().__init__()
        self.second.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(F.relu(self.first(inputs)).double()).float()


class Faulty(Net):
    """Fails in its forward pass, in training alone, or in its backward pass; or gives no gradient."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if self.kind == "forward" and self.training:
            raise LookupError("no such layer")
        if self.kind == "backward":
            return FaultyGradient.apply(outputs)  # pyright: ignore
        return outputs.detach() if self.kind == "detached" else outputs


class FaultyGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:  # pyright: ignore
        return inputs.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
        raise ZeroDivisionError("no gradient")


class Bigrams(nn.Module):
    """Scores the next of eleven tokens by the last one."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, sparse=sparse)
        self.output = nn.Linear(8, 11)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.embedding(inputs))


class Restless(Net):
    """Draws from all generators, counts its calls, moves a buffer, and has dropout and batch statistics."""

    def __init__(self, holds_generator: bool = False):
        super().__init__()
        self.calls: list[int] = []
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.mean: Tensor
        self.generator = torch.Generator() if holds_generator else None  # with one a module cannot be copied

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.append(len(inputs))
        noise = random.random() + np.random.random() + torch.rand(())
        features = self.dropout(self.norm(self.first(inputs)))
        self.mean.copy_(features.mean(0).detach() + noise)
        return self.second(features)


class WithoutRates(torch.optim.SGD):
    """Has no `lr` in its groups."""

    def __init__(self, params: Any):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            del group["lr"]


class Counting(torch.optim.Optimizer):
    """Keeps a number outside its state, so that a resumed run would go on differently."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / self.steps)


class Sharpness(Counting):
    """Needs a closure, though its signature does not say so."""

    def step(self, closure: None = None) -> None:
        assert closure is not None, "two passes are needed"


class Opaque(Counting):
    """Keeps something in its state that no checkpoint can hold."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = {1, 2}
