"""Summary of a run, printed before it starts: workers, model, examples and clients."""

from __future__ import annotations

import torch

from trainer.data import describe
from trainer.loop.train_state import TrainState
from trainer.models import describe_model


def print_banner(state: TrainState) -> None:
    """Print the workers, the model and the data of a run."""
    run = state.run
    topology, clients = run.topology, run.clients
    train, validation, test = (sum(map(len, ids)) for ids in (clients.train, clients.validation, clients.test))
    sizes = ",".join(map(str, topology.silo_sizes))
    print(
        f"workers   {topology.world_size} on {topology.device.type}, threads each: {torch.get_num_threads()}; "
        f"replicas in the silos: [{sizes}]\n"
        f"model     {describe_model(state.model.module)}\n"
        f"examples  {train:,} to train, {validation:,} to validate, {test:,} to test\n"
        f"clients   {len(clients)}",
        flush=True,
    )
    if run.metrics.per_client == "full" and len(clients) > 1:
        print(describe(clients, run.data.train, run.data.label_names), flush=True)
