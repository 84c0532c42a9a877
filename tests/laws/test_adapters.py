"""Adapters: training them is a loop written by hand with peft, and they alone travel and are saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import Only, average, case_run
from tests.laws.test_resume import round_checkpoint
from tests.support.runs import make_clients
from tests.support.transformers import make_llama
from trainer.algorithms import FedAvg
from trainer.checkpoint import Checkpointer
from trainer.data import DataSplits, TensorSource
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.options import RoundOptions
from trainer.models import lora
from trainer.models.adapters import adapter_files, attach_adapter
from trainer.models.outputs import SelectOutput
from trainer.tasks import LanguageModelling
from trainer.tasks.base import IGNORED

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it

SIZES, LENGTH, TEST = [3, 5], 12, 4
ROUNDS, STEPS, LR = 2, 3, 2.0
RANK, TARGETS = 4, "q_proj|v_proj"
TRAINABLE = 2 * RANK * (32 + 32 + 32 + 16)  # layers x rank x (the sides of q_proj and of v_proj)


def masked_data() -> DataSplits:
    """Return random tokens. Of each example some targets at the beginning are ignored, and the last one."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 64, (sum(SIZES) + TEST, LENGTH + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for example, answer in enumerate(torch.randint(1, LENGTH - 1, (len(tokens),), generator=generator)):
        targets[example, :answer] = IGNORED
    targets[:, -1] = IGNORED  # which transformers, that shifts labels by itself, has no place for
    train, test = (TensorSource(inputs[part], targets[part]) for part in (slice(sum(SIZES)), slice(sum(SIZES), None)))
    return DataSplits(train, test, 64)


def adapted(train: Any = "both") -> nn.Module:
    """Return a llama with an adapter whose B is not zero, so that A has a gradient from the first step on."""
    module = make_llama()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attach_adapter(module, lora(rank=RANK, alpha=8), TARGETS, train)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    module.register_forward_hook(SelectOutput("logits"))
    return module


def federated(
    module: nn.Module, folder: Path, silos: int = 1, rounds: int = ROUNDS, cohort: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train by full batches; return the adapter, and the metrics of the result."""
    with distributed(silos) as topology:
        choices: dict[str, Any] = {
            "module": module,
            "task": LanguageModelling(),
            "data": masked_data(),
            "clients": make_clients(SIZES, TEST),
            "sizes": SIZES,
            "algorithm": FedAvg(server=average),
            "client_sampling": Only((cohort,)),
            "optimizer": partial(torch.optim.SGD, lr=LR),
            "batch_size": "all",
            "round": RoundOptions(steps=STEPS),
            "rounds": rounds,
            "checkpoint.every_rounds": 1,
        }
        run = case_run(topology, "fedavg", choices)
        result = fit(run, (), Checkpointer(folder, topology, run.assignment_digest))
        return {name: tensor.clone() for name, tensor in adapter_files(result.model)[1].items()}, result.metrics


def by_hand() -> dict[str, Tensor]:
    """Train a PeftModel on each client, with the loss of transformers, and average the adapters by examples."""
    config, initial = adapter_files(adapted())
    config.inference_mode = False
    model = peft.get_peft_model(make_llama(), config)
    data, adapter = masked_data(), {name: tensor.clone() for name, tensor in initial.items()}
    starts = [0, SIZES[0]]
    for _ in range(ROUNDS):
        trained = []
        for start, size in zip(starts, SIZES, strict=True):
            peft.set_peft_model_state_dict(model, adapter)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
            inputs, targets = data.train.fetch(torch.arange(start, start + size))
            labels = torch.cat([torch.full((size, 1), IGNORED), targets[:, :-1]], 1)
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(input_ids=inputs, labels=labels).loss.backward()
                optimizer.step()
            state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            trained.append({name: tensor.clone() for name, tensor in state.items()})
        adapter = {
            name: sum(size / sum(SIZES) * part[name] for size, part in zip(SIZES, trained, strict=True))
            for name in adapter
        }
    return adapter


def test_fedavg_of_adapters_is_a_loop_by_hand(tmp_path: Path):
    """With peft's own model and the loss of transformers, which leaves out ignored targets."""
    ours, _ = federated(adapted(), tmp_path)
    theirs, initial = by_hand(), adapter_files(adapted())[1]
    assert ours.keys() == theirs.keys() == initial.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        assert (ours[name] - initial[name]).abs().max() > 1e-3
    folder = round_checkpoint(tmp_path, ROUNDS).folder
    assert sum(tensor.numel() for tensor in ours.values()) == TRAINABLE
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2 * TRAINABLE * 12


@pytest.mark.long  # it imports peft in two ranks more
def test_the_adapter_alone_travels(ranks, tmp_path: Path):
    (ours, metrics), (other, _) = ranks(2).run(federated, adapted(), tmp_path, 2)
    theirs = by_hand()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
        assert torch.equal(ours[name], other[name])
    assert metrics["bytes_between_silos"] == ROUNDS * 2 * (2 - 1) * TRAINABLE * 4


def product(adapter: dict[str, Tensor], layer: str) -> Tensor:
    return adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]


def test_with_a_frozen_the_mean_of_products_is_the_product_of_the_mean(tmp_path: Path):
    """FFA-LoRA. With A in training too it is not."""
    for train, is_equal in (("B", True), ("both", False)):
        mean, *parts = (
            federated(adapted(train), tmp_path / f"{train}{cohort}", 1, 1, cohort)[0] for cohort in ((0, 1), (0,), (1,))
        )
        for layer in {name.rpartition(".lora_")[0] for name in mean}:
            shares = [size / sum(SIZES) * product(part, layer) for size, part in zip(SIZES, parts, strict=True)]
            assert torch.allclose(product(mean, layer), sum(shares), rtol=0, atol=1e-6) == is_equal
