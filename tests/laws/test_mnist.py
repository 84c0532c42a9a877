"""The best-known experiment of federated averaging, on the real data, learns as fast as published."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.laws.cases import average
from trainer.algorithms import FedAvg
from trainer.data import Iid, mnist
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.loop.options import EvalOptions, TrainingOptions
from trainer.loop.run import Run
from trainer.models import MLP
from trainer.tasks import Classification

FOLDER = Path(os.environ.get("SILOTRAIN_MNIST", Path(__file__).parents[2] / "../shared/data/mnist"))
ROUNDS = 10


def train_2nn(folder: Path) -> Metrics:
    """Train McMahan et al.

    2017's 2NN: 100 iid clients of 600 digits, 10 a round, batch size 10, one epoch, SGD at 0.1.
    """
    with distributed(silos=2) as topology:
        data = mnist(folder)

        run = Run(
            topology=topology,
            model=MLP,
            task=Classification(),
            data=data,
            clients=Iid().split(data.train, data.test, 100, seed=0),
            algorithm=FedAvg(server=average),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            rounds=ROUNDS,
            training=TrainingOptions(batch_size=10),
            client_sampling=UniformSampler(10),
            eval=EvalOptions(every_rounds=ROUNDS),
        )
        return fit(run).metrics


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no MNIST: set SILOTRAIN_MNIST to the folder of its four IDX files")
def test_fedavg_learns_mnist(ranks):
    """Test accuracy after 10 rounds is at least 0.86; both silos have the same metrics."""
    first, second = ranks(2).run(train_2nn, FOLDER)
    assert first["test/accuracy"] == second["test/accuracy"] >= 0.86
    assert first["examples"] == ROUNDS * 10 * 600
    assert first["steps"] == ROUNDS * 10 * 60
