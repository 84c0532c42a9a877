"""The dry pass before training: what cannot be trained is refused with a sentence, and nothing of the pass remains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cli.command import work
from tests.cli.refusals import assert_says, building
from tests.laws.cases import assert_same
from tests.support import unusual
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import Topology, distributed
from trainer.loop.run import Run

UNUSUAL = "tests.support.unusual"
TABLE = ["data=custom", f"data._target_={UNUSUAL}.table", "model=custom"]
TOKENS = ["data=custom", f"data._target_={UNUSUAL}.tokens", "task=language_modelling", "model=custom"]
SPARSE = [*TOKENS, f"model._target_={UNUSUAL}.Bigrams", "+model.sparse=true"]
TWO_SILOS = ["silos=[2,2]", "algorithm=fedavg"]


def model(name: str, *more: str) -> list[str]:
    return [*TABLE, f"model._target_={UNUSUAL}.{name}", *more]


def optimizer(name: str) -> list[str]:
    return [*model("Net"), "optimizer=custom", f"optimizer._target_={name}"]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


REFUSED = {
    # Outputs
    "a dict": [
        model("Several", "+model.kind=dict"),
        ["model=Several gives a dict with features, logits", "set task.output=features or task.output=logits"],
    ],
    "a tuple": [model("Several", "+model.kind=tuple"), ["gives a tuple with 0, 1", "task.output=0 or task.output=1"]],
    "nothing": [model("Several", "+model.kind=none"), ["gives None", "return a tensor"]],
    "another name": [
        model("Several", "+model.kind=dict", "task.output=scores"),
        ["task.output=scores, but the model gives a dict with features, logits"],
    ],
    "another index": [
        model("Several", "+model.kind=list", "task.output=2"),
        ["task.output=2, but the model gives a list with 0, 1"],
    ],
    "an output of a tensor": [model("Net", "task.output=logits"), ["task.output=logits, but the model gives a Tensor"]],
    "an output of another size": [
        model("Several", "+model.kind=tuple", "task.output=0"),
        ["8 outputs, but the data has 3 classes"],
    ],
    # Types
    "labels that are floats": [
        model("Net", "+data.targets=float32"),
        ["targets are torch.float32", "labels are integers", ".long()"],
    ],
    "tokens that are floats": [
        [*TOKENS, f"model._target_={UNUSUAL}.Bigrams", "+model.sparse=false", "+data.targets=float32"],
        ["targets are float32", "labels are int64", ".long()"],
    ],
    "inputs in double precision": [
        model("Net", "+data.inputs=float64"),
        ["inputs are torch.float64: convert them to float32", "unusual.py, line"],
    ],
    "inputs that are integers": [model("Net", "+data.inputs=int64"), ["inputs are torch.int64, as of tokens"]],
    "complex parameters": [model("Complex"), ["trainable parameters of torch.complex64 (weight)", "view_as_real"]],
    "two types": [
        model("TwoTypes"),
        ["torch.float32 (first.weight, first.bias), torch.float64 (second.weight", "one floating point type"],
    ],
    # Gradients
    "unused parameters": [
        model("Net", "+model.spare=true", "silos=[2]"),
        ["does not depend on spare.weight, spare.bias", "set allow_unused=true"],
    ],
    "unused parameters in silos": [
        model("Net", "+model.spare=true", *TWO_SILOS),
        ["spare.weight", "allow_unused=true"],
    ],
    "no gradient": [model("Faulty", "+model.kind=detached"), ["the loss has no gradient", "do not detach"]],
    "sparse gradients that are clipped": [
        [*SPARSE, "clip.max_norm=1"],
        ["embedding.weight are sparse", "clip.max_norm=1 cannot take", "sparse=False"],
    ],
    "sparse gradients in int8": [
        [*SPARSE, "silos=[2]", "gradient_compression=int8"],
        ["embedding.weight are sparse", "gradient_compression"],
    ],
    "sparse gradients with a proximal term": [
        [*SPARSE, *TWO_SILOS, "algorithm.proximal_mu=0.1"],
        ["embedding.weight are sparse", "terms of the gradient"],
    ],
    "sparse gradients for Adam": [
        [*SPARSE, "optimizer=adam"],
        ["optimizer=Adam failed in its step", "sparse gradients"],
    ],
    # Optimizers
    "LBFGS": [optimizer("torch.optim.LBFGS"), ["optimizer=torch.optim.LBFGS", "closure"]],
    "a closure that is not in the signature": [
        optimizer(f"{UNUSUAL}.Sharpness"),
        ["Sharpness", "two passes are needed", "unusual.py, line"],
    ],
    "no learning rate": [optimizer(f"{UNUSUAL}.WithoutRates"), ["WithoutRates", "no lr in its groups"]],
    "state that is not saved": [
        optimizer(f"{UNUSUAL}.Counting"),
        ["Counting", "takes another step", "not in its state"],
    ],
    "state of no tensors": [optimizer(f"{UNUSUAL}.Opaque"), ["Opaque", "history", "a set"]],
    "a server's closure": [
        [*model("Net"), "algorithm=fedavg", "server._target_=torch.optim.LBFGS", "~server.fused"],
        ["server=torch.optim.LBFGS", "closure"],
    ],
    # The user's own errors
    "a fault in loading": [
        ["data=custom", f"data._target_={UNUSUAL}.load_with_a_fault", "+data.kind=type"],
        [
            "data=",
            "TypeError: object of type 'int' has no len()",
            "unusual.py, line",
            "in load_with_a_fault: return len(3)",
        ],
    ],
    "a key in loading": [
        ["data=custom", f"data._target_={UNUSUAL}.load_with_a_fault", "+data.kind=key"],
        ["KeyError: 'label'", 'return {}["label"]'],
    ],
    "an assertion in loading": [
        ["data=custom", f"data._target_={UNUSUAL}.load_with_a_fault", "+data.kind=no"],
        ["AssertionError", "raise AssertionError"],
    ],
    "a fault in training": [
        model("Faulty", "+model.kind=forward"),
        ["failed in its forward pass: LookupError: no such layer", "unusual.py, line", "in forward: raise LookupError"],
    ],
    "a fault in the backward pass": [
        model("Faulty", "+model.kind=backward"),
        ["failed in its backward pass: ZeroDivisionError", "unusual.py, line"],
    ],
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.quick_rows(10)
def test_what_cannot_be_trained_is_refused(name: str, topology: Topology) -> None:
    overrides, parts = REFUSED[name]
    assert_says(building(overrides, topology), parts)


def built(overrides: list[str], topology: Topology, *sizes: int) -> Run:
    return build(read_config(compose_tree(overrides)), replace(topology, silo_sizes=sizes))


ACCEPTED = {
    "dict": model("Several", "+model.kind=dict", "task.output=logits"),
    "tuple": model("Several", "+model.kind=tuple", "task.output=1"),
    "a named tuple by name": model("Several", "+model.kind=named", "task.output=logits"),
    "a named tuple by index": model("Several", "+model.kind=named", "task.output=1"),
    "sparse": [*SPARSE, "optimizer=sgd"],
    "unused parameters": model("Net", "+model.spare=true", "allow_unused=true"),
    "labels in bytes": model("Net", "+data.targets=uint8"),
    "short labels": model("Net", "+data.targets=int32"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_be_trained_is_accepted(name: str, topology: Topology) -> None:
    assert built(ACCEPTED[name], topology, 2).make_model()


def test_unused_parameters_of_silos_of_one_rank_are_left_alone(topology: Topology) -> None:
    """Nobody waits for their gradients."""
    assert built(model("Net", "+model.spare=true", "algorithm=fedavg"), topology, 1, 1)


def random_states() -> list[object]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.default_generator.get_state().tolist()]  # pyright: ignore


@pytest.mark.parametrize("holds_generator", ["false", "true"])
def test_nothing_of_the_dry_pass_remains(
    holds_generator: str, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and all generators are as in a run without it. A module that holds a generator cannot be copied."""
    restless = model("Restless", f"+model.holds_generator={holds_generator}")

    def build_anew() -> tuple[unusual.Restless, list[object]]:
        random.seed(3)
        np.random.seed(3)
        run = built(restless, topology, 1)
        states, module = random_states(), run.make_model()
        assert isinstance(module, unusual.Restless)
        return module, states

    module, states = build_anew()
    monkeypatch.setattr("trainer.config.build.dry_pass", lambda run, copy_model: None)
    reference, expected = build_anew()
    assert states == expected
    assert module.calls == reference.calls
    assert module.training and all(parameter.grad is None for parameter in module.parameters())
    assert_same(dict(module.named_parameters()), dict(reference.named_parameters()))
    assert_same(dict(module.named_buffers()), dict(reference.named_buffers()))


def trained(overrides: list[str]) -> None:
    work([*overrides, "rounds=2", "eval.every_rounds=2", "batch_size=8"])


TRAINED = {
    "sparse": [*SPARSE, "optimizer=sgd"],
    "unused": model("Net", "+model.spare=true", "allow_unused=true"),
    "sometimes unused": model("Sometimes", "+model.by=batch", "allow_unused=true"),
    "unused on a rank": model("Sometimes", "+model.by=rank", "allow_unused=true"),
    "an output": model("Several", "+model.kind=dict", "task.output=logits"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_two_replicas_train(ranks, name: str, tmp_path) -> None:
    ranks(2).run(trained, [*TRAINED[name], f"run_dir={tmp_path / 'run'}"])
    assert '"finished"' in (tmp_path / "run/state.json").read_text()
