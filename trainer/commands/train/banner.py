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
        f"clients   {len(clients)}{_alone(state)}",
        flush=True,
    )
    if run.metrics.per_client == "full" and len(clients) > 1:
        print(describe(clients, run.data.train, run.data.label_names), flush=True)


def _alone(state: TrainState) -> str:
    """Say that an algorithm which combines clients, or silos, has only one; empty if it has more."""
    run = state.run
    if run.algorithm.moves_global_model or not state.model.has_shared:
        return ""
    if len(run.clients) == 1:
        return ": it trains alone, there is nobody to combine it with; set clients=10, or silos=2"
    if run.topology.num_silos == 1:
        return ": in one silo, which trains those of a round one after the other; silos=2 trains them side by side"
    return ""
