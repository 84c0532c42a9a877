"""Algorithms: what happens between the silos at the end of a round. One file each."""

from trainer.algorithms.algorithm import Algorithm, InnerState
from trainer.algorithms.fedavg import FedAvg
from trainer.algorithms.sync import Sync

__all__ = ["Algorithm", "FedAvg", "InnerState", "Sync"]
