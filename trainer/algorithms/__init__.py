"""Algorithms: how clients train, and what happens between the silos at the end of a round. One file each."""

from trainer.algorithms.aggregation_rule import Mean
from trainer.algorithms.base import Algorithm
from trainer.algorithms.fedavg import FedAvg
from trainer.algorithms.feddyn import FedDyn
from trainer.algorithms.fednova import FedNova
from trainer.algorithms.fedopt import FedOpt
from trainer.algorithms.model_averaging import ModelAveraging
from trainer.algorithms.robust import Krum, Median, TrimmedMean
from trainer.algorithms.scaffold import Scaffold
from trainer.algorithms.streaming import Streaming
from trainer.algorithms.sync import Sync

__all__ = [
    "Algorithm",
    "FedAvg",
    "FedDyn",
    "FedNova",
    "FedOpt",
    "Krum",
    "Mean",
    "Median",
    "ModelAveraging",
    "Scaffold",
    "Streaming",
    "Sync",
    "TrimmedMean",
]
