"""Clients that train alone, each evaluated on the whole test set: the lower baseline of a federated result."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor

from trainer.checkpoint import newest_complete
from trainer.config.build import build
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.models.flat import FlatModel


@torch.no_grad()
def accuracy_on_all(folder: Path) -> float:
    """Return the mean accuracy on the whole test set over the clients' models of a finished run of algorithm=local.

    The run itself evaluates a client on examples like its own, which is easy if those have few labels.
    """
    saved = newest_complete(folder / "checkpoints")
    assert saved is not None, f"{folder} has no checkpoint"
    with distributed(device="cpu") as topology:
        run = build(read_config(yaml.safe_load((folder / "config.yaml").read_text())), topology)
    model = FlatModel(run.model().eval(), run.algorithm.is_shared)
    inputs, targets = run.data.test.fetch(torch.arange(len(run.data.test)))
    return mean(_accuracy(model, client["personal"], inputs, targets) for client in saved.load("clients").values())


def _accuracy(model: FlatModel, personal: dict[str, Any], inputs: Tensor, targets: Tensor) -> float:
    model.load_personal_state(personal)
    return model.module(inputs).argmax(1).eq(targets).double().mean().item()
