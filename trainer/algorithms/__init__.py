"""Algorithms: how clients train, and what happens between the silos at the end of a round. One file each."""

from trainer.algorithms.aggregation_rule import Mean as Mean
from trainer.algorithms.base import Algorithm as Algorithm
from trainer.algorithms.fedavg import FedAvg as FedAvg
from trainer.algorithms.feddyn import FedDyn as FedDyn
from trainer.algorithms.fednova import FedNova as FedNova
from trainer.algorithms.fedopt import FedOpt as FedOpt
from trainer.algorithms.model_averaging import ModelAveraging as ModelAveraging
from trainer.algorithms.robust import Krum as Krum
from trainer.algorithms.robust import Median as Median
from trainer.algorithms.robust import TrimmedMean as TrimmedMean
from trainer.algorithms.scaffold import Scaffold as Scaffold
from trainer.algorithms.streaming import Streaming as Streaming
from trainer.algorithms.sync import Sync as Sync
