"""Buffers that are no statistics: the same everywhere at first, never combined, and resumed where they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.laws.cases import CLASSES, FEATURES, SIZES, case_run, leaves, silos_of, tiny_data
from tests.laws.test_midround import assert_left_and_bit_equal
from tests.laws.test_resume import ROUNDS, assert_bit_equal, noisy_choices, round_checkpoint
from trainer.algorithms import FedAvg
from trainer.checkpoint import Checkpointer
from trainer.checkpoint.run_dir import RunDir
from trainer.distributed.topology import SiloSpec, distributed
from trainer.loop.fit import fit
from trainer.models.flat import frozen_tensors
from trainer.utils.errors import InputError

WAVE = torch.polar(torch.ones(FEATURES), torch.arange(FEATURES) * 0.1)

# Buffers that nothing writes to.
STILL = {
    "complex": WAVE,
    "conjugated": WAVE.conj(),
    "negated": WAVE.conj().imag,
    "mask": torch.full((4, 4), float("-inf")).triu(1),
    "sentinel": torch.tensor(float("nan")),
    "expanded": torch.arange(float(FEATURES)).expand(4, FEATURES),
    "windows": torch.arange(9.0).unfold(0, 3, 2),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "flags": torch.tensor([True, False]),
    "great": torch.tensor(60000.0, dtype=torch.float16),
    "whole": torch.tensor([2**60 + 1, -(2**62) - 1]),
    "unsigned": torch.tensor([65535], dtype=torch.uint16),
    "eighth": torch.tensor([-448.0]).to(torch.float8_e4m3fn),
    "nothing": torch.zeros(0, 2),
    "running_var": torch.ones(3),
}


def bits(tensor: Tensor) -> list[int]:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).tolist()


class Holder(nn.Module):
    """A classifier that holds buffers of every kind, uses some of them, and moves none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.held = nn.Module()
        for name, buffer in STILL.items():
            self.held.register_buffer(name, buffer, persistent=name != "flags")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer((inputs * self.held.get_buffer("complex")).real + self.held.get_buffer("expanded")[0])


class Moving(nn.Module):
    """A classifier with a queue of what it has seen, a pointer, a teacher, and buffers that it assigns anew.

    All of them have a part in the outputs. The queue and the teacher differ between ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer = nn.Linear(FEATURES, CLASSES)
        for parameter in self.layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.teacher.load_state_dict(self.layer.state_dict())
        self.register_buffer("queue", torch.randn(5, FEATURES, generator=generator))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("seen", torch.tensor(0.0), persistent=False)
        self.register_buffer("last", None)
        self.queue: Tensor
        self.pointer: Tensor
        self.seen: Tensor
        self.last: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs) + self.teacher(inputs) + 0.1 * self.layer(self.queue.clone()).mean(0)
        if self.last is not None:
            outputs = outputs + 0.1 * self.layer(self.last)
        outputs = outputs * (1 + torch.sin(self.seen))
        if self.training and len(inputs):
            self._move(inputs.detach())
        return outputs

    @torch.no_grad()
    def _move(self, inputs: Tensor) -> None:
        self.queue[self.pointer] = inputs[0]
        self.pointer.copy_((self.pointer + 1) % len(self.queue))
        self.seen = self.seen + len(inputs)
        self.register_buffer("made_later", self.seen * 2)
        self.last = inputs[-1:].clone()
        self.teacher.weight.data.mul_(0.9).add_(self.layer.weight, alpha=0.1)


def train_holder(name: str, silos: SiloSpec, folder: Path) -> tuple[dict[str, list[int]], bool, float]:
    """Return the bytes of the buffers after two rounds, whether parameters have moved, and the clients left out."""
    with distributed(silos_of(name, silos)) as topology:
        start = Holder()
        run = case_run(topology, name, {"module": start, "data": tiny_data(sum(SIZES), torch.float32)})
        result = fit(run, (), Checkpointer(folder, topology, run.assignment_digest))
        module: Any = result.model
        moved = not torch.equal(module.layer.weight, start.layer.weight)
        return {n: bits(b) for n, b in module.held.named_buffers()}, moved, result.metrics.get("clients/nonfinite", 0)


@pytest.mark.parametrize(
    ("name", "silos"), [("sync", 1), ("fedavg", 2), ("local", 2), ("diloco", [2])], ids=["sync", "2", "local", "1 of 2"]
)
def test_buffers_of_any_kind_stay_as_they_are(ranks, name: str, silos: SiloSpec, tmp_path: Path):
    """Masks with -inf and NaN do not make a client's numbers count as not finite; all bits are the first ones."""
    for held, moved, left_out in ranks(2).run(train_holder, name, silos, tmp_path):
        assert held == {name: bits(buffer) for name, buffer in STILL.items()}
        assert moved and not left_out


def assert_same_local_tensors(first: Path, second: Path, shards: int) -> None:
    """Compare what each rank has saved of its own; it differs between the ranks."""
    saved, expected = (round_checkpoint(folder, ROUNDS) for folder in (first, second))
    ours, theirs = ([leaves(each.load_shard(s, "own/local")) for s in each.shards] for each in (saved, expected))
    assert len(ours) == shards
    for one, other in zip(ours, theirs, strict=True):
        assert {"queue", "seen", "last", "made_later", "teacher.weight"} <= set(one)
        assert {name: bits(leaf) for name, leaf in one.items()} == {name: bits(leaf) for name, leaf in other.items()}
    assert len({str(bits(one["queue"])) for one in ours}) == shards


def moving_choices(name: str) -> dict[str, Any]:
    return noisy_choices(name) | {"module": Moving()}


@pytest.mark.parametrize("name", ["sync", "fedavg", "diloco"])
def test_what_moves_is_resumed(ranks, name: str, tmp_path: Path):
    """After a round, with each rank's own queue and teacher, though the model is that of rank 0."""
    assert_bit_equal(ranks(2), name, 2, moving_choices(name), tmp_path)
    assert_same_local_tensors(tmp_path / "two_parts", tmp_path / "one", 2)


@pytest.mark.parametrize("name", ["sync", "fedavg"])
def test_what_moves_is_resumed_in_the_middle_of_a_round(ranks, name: str, tmp_path: Path):
    assert_left_and_bit_equal(ranks(2), name, 2, moving_choices(name), tmp_path, {0: (0, 2)})
    assert_same_local_tensors(tmp_path / "left", tmp_path / "alone", 2)


def personal_choices() -> dict[str, Any]:
    algorithm = FedAvg(shared_params="layer|teacher|queue|last", client_optimizer_state="keep")
    return moving_choices("fedavg") | {"algorithm": algorithm}


@pytest.mark.parametrize("size", [2, 4])
def test_personal_buffers_stay_with_their_client(ranks, size: int, tmp_path: Path):
    """Each client has a pointer and a counter of its own, also in silos of two replicas: resumed with equal bits."""
    assert_bit_equal(ranks(size), "fedavg", 2 if size == 2 else [2, 2], personal_choices(), tmp_path)
    clients = round_checkpoint(tmp_path / "one", ROUNDS).load("clients")
    seen = {float(state["personal"]["seen"]) for state in clients.values()}
    assert len(clients) > 4 and len(seen) > 1


def finetuned(personal_steps: int) -> dict[str, list[int]]:
    with distributed(2) as topology:
        run = case_run(topology, "fedavg", moving_choices("fedavg") | {"eval.personal_steps": personal_steps})
        result = fit(run)
        return {
            name: bits(tensor) for name, tensor in (*result.model.named_parameters(), *result.model.named_buffers())
        }


def test_evaluating_personal_models_moves_no_buffer(ranks):
    with_them, without = (ranks(2).run(finetuned, steps) for steps in (2, 0))
    for ours, theirs in zip(with_them, without, strict=True):
        assert ours == theirs


def files_of(folder: Path) -> dict[str, list[int]]:
    """Train in a run folder; return the model of this rank."""
    with distributed(2) as topology:
        run = case_run(topology, "fedavg", moving_choices("fedavg"))
        result = fit(run, (), Checkpointer(folder / "checkpoints", topology, run.assignment_digest))
        return {name: bits(tensor) for name, tensor in result.model.state_dict().items() if name != "made_later"}


def test_the_model_on_disk_is_that_of_one_rank(ranks, tmp_path: Path):
    """Its parts that belong to the ranks are all those of the first."""
    first, second = ranks(2).run(files_of, tmp_path)
    RunDir(tmp_path).write_models(frozen_tensors(Moving()))
    from safetensors.torch import load_file

    assert {name: bits(tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items()} == first != second


class Thawing(nn.Module):
    """Thaws a layer in its third forward pass, or adds one."""

    def __init__(self, adds: bool):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 4).requires_grad_(False), nn.Linear(4, CLASSES)
        self.adds, self.passes = adds, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == 3 and self.adds:
            self.extra = nn.Linear(CLASSES, CLASSES)
        elif self.passes == 3:
            self.first.requires_grad_(True)
        return self.last(F.relu(self.first(inputs)))


def thaw(name: str, adds: bool) -> str:
    with distributed(silos_of(name, 2)) as topology:
        choices = {"module": Thawing(adds), "data": tiny_data(sum(SIZES), torch.float32)}
        with pytest.raises(InputError) as raised:
            fit(case_run(topology, name, choices))
        return str(raised.value)


@pytest.mark.parametrize("adds", [False, True], ids=["thawed", "added"])
def test_parameters_that_would_not_be_trained_are_refused(ranks, adds: bool):
    """Thawed or added while the model trains, they would stay as they were, without a word."""
    names = "extra.weight, extra.bias" if adds else "first.weight, first.bias"
    for name in ("sync", "fedavg"):
        for message in ranks(2).run(thaw, name, adds):
            assert f"began to require gradients in round 1: {names}.\n" in message
            assert "  let them require gradients from the start, or" in message


class Sites(nn.Module):
    """Layers under names with a slash and a tilde."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"site/a": nn.Linear(FEATURES, 4), "~1": nn.Linear(4, CLASSES)})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers["~1"](F.relu(self.layers["site/a"](inputs)))


def test_names_may_have_a_slash(ranks, tmp_path: Path):
    """Also those of a client's optimizer and of gradients that are held back: resumed with equal bits."""
    assert_bit_equal(ranks(2), "diloco", 2, noisy_choices("diloco") | {"module": Sites()}, tmp_path)
