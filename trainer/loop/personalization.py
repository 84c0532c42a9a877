"""What clients have of their own, put together: the model that a client gets which has none yet."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.loop.local_trainer import LocalTrainer


def average_personal_parameters(trainer: LocalTrainer) -> dict[str, Tensor]:
    """The personal tensors' average over all clients that have trained, by n_k; the fresh ones if none has.

    Statistics are pooled as those between silos are. The model's own personal tensors are overwritten. A collective.
    """
    model, own = trainer.model, trainer.model.personal_statistics
    lengths = [1, len(model.personal), len(own.vector())]
    sums = torch.zeros(sum(lengths), dtype=torch.float64)
    counts = torch.zeros_like(own.counts())
    for client, kept in trainer.client_states.items():
        model.load_personal_state(kept["personal"])
        one = torch.cat([torch.ones(1).double(), model.personal.double().cpu(), own.vector()])
        sums.add_(one, alpha=trainer.run.training_weights[client])
        counts = torch.maximum(counts, own.counts())
    weight, parameters, statistics = collectives.all_reduce_between_silos(sums, trainer.run.topology).split(lengths)
    if len(counts):
        collectives.all_reduce_max(counts)
    if not weight:
        return trainer.initial_personal_state
    model.personal.copy_(parameters / weight)
    own.load(statistics / weight, counts)
    return model.personal_state()
