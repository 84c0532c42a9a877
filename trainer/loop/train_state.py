"""The state of a run on this rank: the model, the algorithm, the clients, and how far the run has come."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.round import Round
from trainer.data.transforms import Compose
from trainer.distributed import collectives
from trainer.distributed.sharding import initial_device, parallelize
from trainer.distributed.transport import Transport
from trainer.loop.control import LoopControl
from trainer.loop.exchange import ExchangeFactory, InWorld, model_digests
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.progress import Progress
from trainer.loop.run import Run
from trainer.loop.throughput import ThroughputMeter
from trainer.models.flat import FlatModel, parameter_layout
from trainer.optim.ema import ExponentialMovingAverage


class TrainState:
    """The live objects of a run. All silos start with rank 0's initial model.

    Attributes:
        run: the choices.
        control: what this process was asked to do.
        progress: how far the run has come.
        threads: the number of CPU threads of each rank.
        participations: the number of rounds in which each client took part [clients], so that every rank knows where
            any client's stream of batches stands.
        transport: moves vectors between the silos.
        exchange: how the silos come together.
        model: the module, as flat vectors.
        ema: the exponential moving average of the weights; None if there is none.
        algorithm: the algorithm at work.
        trainer: trains the clients of this silo.
        throughput: measures rates.
        local_fingerprint: of this rank's model at the end of its local work.
        is_stopping: whether all ranks know that the run stops here, to be resumed later.
    """

    def __init__(
        self,
        run: Run,
        control: LoopControl | None = None,
        make_exchange: ExchangeFactory = InWorld,
    ):
        """Make the state of a run. A collective.

        Args:
            run: the choices.
            control: what this process is asked to do; None: nothing.
            make_exchange: makes what brings the silos together.
        """
        self.run, self.control = run, control or LoopControl(run.checkpoint.every_seconds)
        self.progress = Progress()
        self.threads: list[int] = (
            collectives.all_gather_rows(torch.tensor([torch.get_num_threads()])).flatten().tolist()
        )
        self.participations = torch.zeros(len(run.training_sets), dtype=torch.int64)
        with initial_device(run.topology):
            module, algorithm = run.make_model(), run.algorithm
        run.validate_model(module)
        digests = model_digests(module)
        parallel = parallelize(module, run.topology, run.silo, run.gradient_compression)
        layout = parameter_layout(module, algorithm.is_shared, parallel)
        self.exchange = make_exchange(run.topology, run.update_compression, layout)
        self.transport: Transport = self.exchange.transport
        self.model = FlatModel(
            module, algorithm.is_shared, algorithm.batchnorm_stats, self.transport.alignment, parallel
        )
        self.transport.repeated_from = self.model.repeated.start if self.model.repeated_names else None
        frozen_digest = self.exchange.start(parallel, digests)
        decay = run.training.ema_decay
        self.ema = None if decay is None else ExponentialMovingAverage(self.model, decay)
        self.algorithm = algorithm.setup(self.model, run.optimizer, run.training_weights, self.transport)
        ema_of_steps = self.ema if algorithm.moves_global_model else None
        transforms = self._fit_transforms()
        self.trainer = LocalTrainer(
            run, self.model, parallel, frozen_digest, self.algorithm, self.control, transforms, ema_of_steps
        )
        self.throughput = ThroughputMeter(run, module)
        self.local_fingerprint = 0
        self.is_stopping = False
        self._wait_seconds = 0.0

    def _fit_transforms(self) -> Compose:
        """Return the transforms, fitted to the training set. A collective, of sums of numbers alone."""
        run, topology = self.run, self.run.topology
        if not run.transforms.needs_fitting:
            return run.transforms
        none = np.empty(0, np.int64)  # of a silo without clients
        ids = np.concatenate([none, *(run.clients.train[client] for client in run.homes[topology.silo])])
        shard = torch.from_numpy(ids)[topology.replica :: topology.num_replicas]
        shard = shard if topology.counts_examples else shard[:0]
        numbers = count()

        def total(part: Tensor) -> Tensor:
            _, sums = self.exchange.sum(f"start/transforms-{next(numbers)}", {}, {"total": part})
            return sums["total"]

        return run.transforms.fit(run.data.train, shard, total, topology.device)

    def take_wait_seconds(self) -> float:
        """Return the seconds, since the last call, in which this rank did nothing but wait for other silos' sums."""
        before, self._wait_seconds = self._wait_seconds, self.transport.wait_seconds
        return self._wait_seconds - before

    @property
    def averages_personal(self) -> bool:
        """Whether there is a mean of the clients' personal parameters, beside those that are shared."""
        return self.exchange.averages_personal and self.model.has_personal and self.model.has_shared

    def prepare_new_clients(self) -> None:
        """Average the personal parameters, for clients that will train for the first time. A collective.

        It belongs to the end of a round: in the next one, a silo that resumes in its middle would not take part.
        """
        if self.averages_personal and not bool(self.participations.all()):
            self.trainer.clients.next_initial_personal_state = self.trainer.average_personal()

    def init_new_clients(self, round: Round) -> None:
        """Give clients that train for the first time the mean of the others' personal parameters."""
        clients = self.trainer.clients
        if not bool(self.participations[list(round.cohort)].all()):
            clients.initial_personal_state = clients.next_initial_personal_state

    def update_ema_after_round(self) -> None:
        """Take a round's combination into the average of the weights, unless every step was."""
        if self.ema and not self.run.algorithm.moves_global_model:
            self.ema.update()
