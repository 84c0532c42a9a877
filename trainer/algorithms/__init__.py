"""Algorithms: what happens between the silos at the end of a round. One file each."""

from trainer.algorithms.base import Algorithm, InnerState
from trainer.algorithms.fedavg import FedAvg
from trainer.algorithms.fednova import FedNova
from trainer.algorithms.fedopt import FedOpt
from trainer.algorithms.model_averaging import Averaging
from trainer.algorithms.robust import Robust
from trainer.algorithms.scaffold import Scaffold
from trainer.algorithms.streaming import Streaming
from trainer.algorithms.sync import Sync

__all__ = [
    "Algorithm",
    "Averaging",
    "FedAvg",
    "FedNova",
    "FedOpt",
    "InnerState",
    "Robust",
    "Scaffold",
    "Streaming",
    "Sync",
]
