"""The runs to disturb: small, quick to start, and with all the state that a resume could lose."""

from __future__ import annotations

from torch import Tensor, nn

# Dropout, momentum, and batch statistics that differ between ranks; a round takes a second or two, with several
# mid-round checkpoints.
COMMON = (
    "launch.nproc_per_node=2",
    "launch.threads_per_worker=1",
    "launch.device=cpu",
    "launch.max_restarts=100000",
    "checkpoint.every_seconds=0.3",
    "model=custom",
    "model._target_=scripts.chaos.cases.Noisy",
    "schedule=cosine",
)

CASES: dict[str, tuple[str, ...]] = {
    "sync": ("algorithm=sync", "optimizer=momentum", "optimizer.lr=0.02", "round.steps=240"),
    "fedavg_adam": (
        *(
            "algorithm=fedavg",
            "server=adam",
            "silos=2",
            "clients=5",
            "client_sampling=sample",
            "client_sampling.clients_per_round=3",
        ),
        *("partition=dirichlet", "optimizer.lr=0.05", "round.steps=120"),
    ),
    "diloco": ("algorithm=diloco", "silos=2", "clients=3", "optimizer.lr=0.001", "round.steps=100"),
}

# Silos whose ranks hold parts of the model. Workers are forked: four of them would import torch for half a minute.
SHARDED_CASES: dict[str, tuple[str, ...]] = {
    "parts": (
        *("launch.nproc_per_node=4", "silos=2", "silo.shard=full", "algorithm=fedavg", "server=adam", "clients=3"),
        *("partition=dirichlet", "optimizer=momentum", "optimizer.lr=0.05", "ema_decay=0.9", "round.steps=60"),
    ),
    "copies of parts": (
        *("launch.nproc_per_node=4", "silos=1", "silo.shard=2", "algorithm=sync", "optimizer=adamw"),
        *("optimizer.lr=0.001", "round.steps=60"),
    ),
}


class Noisy(nn.Module):
    """A perceptron with dropout and batch statistics: images [B, 1, 8, 8] to [B, 10]; 574,570 parameters."""

    def __init__(self, width: int = 720):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
