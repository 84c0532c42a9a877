"""A run: all choices, as one value that the loop reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from trainer.algorithms import Algorithm
from trainer.algorithms.base import Setting
from trainer.algorithms.round import Round
from trainer.data import Clients, DataSplits, ExampleWeights, fingerprint
from trainer.data.client_sampling.sampling import AllClients, ClientSampler
from trainer.data.loading.prefetch import check_cache_on_gpu
from trainer.data.transforms import Compose
from trainer.distributed.compression import Uncompressed, UpdateCompression
from trainer.distributed.gradients import FullPrecisionReducer, GradientReducer
from trainer.distributed.topology import Topology
from trainer.loop.assignment import assign_clients
from trainer.loop.stopping import StopCriteria
from trainer.optim import Constant, GradientClipper, Schedule
from trainer.tasks import Task
from trainer.utils.seeding import derive_seed

PerClientReport = Literal["full", "scores", "none"]


Stragglers = Literal["keep", "drop"]


@dataclass(frozen=True)
class RoundLength:
    """The length of a client's round.

    Attributes:
        epochs: local epochs; or (least, most), from which the number is drawn for every client and round.
        steps: local steps, in place of epochs; None: epochs count.
        sync_rounds: number of first rounds of one step: post-local SGD, Lin et al. 2020 (arXiv 1808.07217).
        deadline_seconds: time after which a silo ends its round, whatever is left to do; None: never.
        stragglers: `keep` or `drop` the work of a client that had no time to finish it.
    """

    epochs: int | tuple[int, int] = 1
    steps: int | None = None
    sync_rounds: int = 0
    deadline_seconds: float | None = None
    stragglers: Stragglers = "keep"

    def num_steps(self, steps_per_epoch: int, round: Round, client: int) -> int:
        """Return the number of steps of a client in a round, given that of its epoch."""
        if round.index < self.sync_rounds:
            return 1
        return self.steps or self._epochs(round, client) * steps_per_epoch

    def first_step(self, steps_per_epoch: int, earlier_rounds: int) -> int:
        """Return the step of a client's stream of batches at which its round begins.

        Every round but the synchronous ones has room for the most that may be done in it: so this is a pure function.

        Args:
            steps_per_epoch: of the client.
            earlier_rounds: the number of rounds in which it took part before.
        """
        synchronous = min(earlier_rounds, self.sync_rounds)
        most = self.epochs if isinstance(self.epochs, int) else self.epochs[1]
        return synchronous + (earlier_rounds - synchronous) * (self.steps or most * steps_per_epoch)

    def _epochs(self, round: Round, client: int) -> int:
        if isinstance(self.epochs, int):
            return self.epochs
        least, most = self.epochs
        return least + round.seed_for("epochs", client) % (most - least + 1)


@dataclass(frozen=True)
class Run:
    """A run, ready for `fit`. Replicas and silos are those of `topology`; everything else is equal on all ranks.

    Attributes:
        topology: the ranks, and the silos that they form.
        module: the model, trained in place.
        task: loss and scores.
        data: the examples.
        clients: the client of each example.
        algorithm: how clients train and silos combine.
        optimizer: makes the clients' optimizer from a list of named parameters.
        rounds: number of rounds.
        batch_size: examples per optimizer step of a silo, whatever its number of ranks; None: all of the client's.
        micro_batch_size: examples that one rank puts through the model at once; None: its whole share of the batch;
            auto: the largest for which all ranks have room.
        weights: of examples in the loss, and of clients in the combination; None: each example 1.
        transforms: of examples on their way to the model.
        length: how long a client's round is.
        stop: when the run is finished before its last round.
        schedule: factor on the learning rates, by the fraction of the run in [0, 1].
        client_sampling: the clients that take part in a round.
        update_compression: of vectors between silos.
        clip: limits to a step's gradient.
        ema_decay: of the exponential moving average of the weights; None: there is none.
        autocast: dtype of the forward pass; None: that of the parameters.
        compile_backend: torch.compile's for the model; None: it is not compiled.
        gradient_compression: of the mean inside a silo; without effect in silos of one replica.
        seed: of all random streams.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
        save_every: rounds between checkpoints; the last round is always saved.
        evaluation_batch_size: examples that one rank evaluates at once.
        per_client: the metrics of single clients: `full`, `scores` only, or `none`.
        max_nonfinite_rounds: consecutive rounds with nonfinite clients that end the run.
        personal_steps: steps of its own after which each client's model is evaluated too; 0: it is not.
        peak_flops: FLOP/s of the device of each rank, for the metric `mfu`; None: by the device's name.
        measures_flops: whether the rate of large matrix products is measured at the start, for `measured_mfu`.
        cache_on_gpu: whether a GPU holds the training set in its memory; None: if it is small.

    Raises:
        ValueError: the choices cannot be combined.
    """

    topology: Topology
    module: nn.Module
    task: Task
    data: DataSplits
    clients: Clients
    algorithm: Algorithm
    optimizer: Callable[..., torch.optim.Optimizer]
    rounds: int
    batch_size: int | None
    micro_batch_size: int | Literal["auto"] | None = None
    weights: ExampleWeights | None = None
    transforms: Compose = field(default_factory=Compose)
    length: RoundLength = field(default_factory=RoundLength)
    stop: StopCriteria = field(default_factory=StopCriteria)
    schedule: Schedule = field(default_factory=Constant)
    client_sampling: ClientSampler = field(default_factory=AllClients)
    update_compression: UpdateCompression = field(default_factory=Uncompressed)
    clip: GradientClipper = field(default_factory=GradientClipper)
    ema_decay: float | None = None
    autocast: torch.dtype | None = None
    compile_backend: str | None = None
    gradient_compression: GradientReducer = field(default_factory=FullPrecisionReducer)
    seed: int = 0
    evaluate_every: int = 1
    save_every: int = 1
    evaluation_batch_size: int = 1024
    per_client: PerClientReport = "full"
    max_nonfinite_rounds: int = 3
    personal_steps: int = 0
    peak_flops: float | None = None
    measures_flops: bool = False
    cache_on_gpu: bool | None = None

    def __post_init__(self):
        check_cache_on_gpu(self.data.train, self.topology.device, self.cache_on_gpu)
        self.algorithm.validate(self.setting)
        self._check_shared()
        self._check_stop()
        if self.length.sync_rounds and not self.client_sampling.takes_all:
            raise ValueError(
                f"round.sync_rounds={self.length.sync_rounds} with a cohort of some clients: their batches would be of "
                "different rounds.\n  set client_sampling=all, or round.sync_rounds=0"
            )

    @property
    def setting(self) -> Setting:
        """The choices that the algorithm may be unable to work with."""
        return Setting(
            optimizer=self.optimizer,
            clip=self.clip,
            silos=self.topology.num_silos,
            clients_per_round=self.client_sampling.round_size(len(self.clients)),
            sampling=None if self.client_sampling.takes_all else self.client_sampling.name,
            drops_stragglers=self.length.stragglers == "drop",
            finetuning_steps=self.personal_steps,
            compression=None if isinstance(self.update_compression, Uncompressed) else self.update_compression.name,
        )

    def _check_shared(self) -> None:
        names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        if any(map(self.algorithm.is_shared, names)):
            return
        if not isinstance(self.update_compression, Uncompressed):
            raise ValueError(
                f"update_compression={self.update_compression.name}, but algorithm.shared_params finds no "
                "parameter: clients train alone, and nothing goes between silos.\n"
                "  set update_compression=fp32, or algorithm=fedavg"
            )
        if self.ema_decay is not None:
            raise ValueError(
                f"ema_decay={self.ema_decay}, but algorithm.shared_params finds no parameter: there are no "
                "global weights to average.\n"
                "  set ema_decay=null, or algorithm=fedavg"
            )

    def _check_stop(self) -> None:
        stop = self.stop
        looked_at = {"metric_target": stop.metric_target, "patience_evaluations": stop.patience_evaluations}
        asked = [f"stop.{name}={value}" for name, value in looked_at.items() if value is not None]
        if asked and not any(map(len, self.clients.validation)):
            raise ValueError(
                f"{' and '.join(asked)}: no examples are held out for validation, which it goes by.\n"
                "  set data.validation=0.1 or more, or stop by stop.max_training_seconds"
            )
        evaluations = -(-self.rounds // self.evaluate_every)
        # The first evaluation is progress, and the last one ends the run anyway.
        if stop.patience_evaluations is not None and stop.patience_evaluations > evaluations - 2:
            raise ValueError(
                f"stop.patience_evaluations={stop.patience_evaluations} with rounds={self.rounds} and "
                f"eval.every_rounds={self.evaluate_every}: with {evaluations} evaluations, patience cannot run out "
                "before the last.\n"
                f"  set stop.patience_evaluations to {max(evaluations - 2, 1)} or less, or more rounds, or evaluate "
                "more often"
            )

    @cached_property
    def training_sets(self) -> Sequence[np.ndarray]:
        """The ids of the examples by client, or those of all clients if they are trained as one."""
        return self.algorithm.merge_clients(self.clients.train, lambda sets: np.sort(np.concatenate(sets)))

    @cached_property
    def training_sizes(self) -> list[int]:
        """The number of training examples by client."""
        return [len(ids) for ids in self.training_sets]

    @cached_property
    def training_weights(self) -> Sequence[float]:
        """n_k by client: the number of training examples, or the sum of their weights if they have any."""
        if self.weights is None:
            return self.training_sizes
        return self.algorithm.merge_clients(list(self.weights.clients), sum)

    @cached_property
    def data_fingerprint(self) -> str:
        """A hash of the examples, of their clients, and of when these are available."""
        data, availability = fingerprint(self.data, self.clients), self.client_sampling.fingerprint()
        return f"{data}-{derive_seed(availability):016x}" if availability else data

    @cached_property
    def homes(self) -> list[list[int]]:
        """The clients that each silo evaluates and whose state it keeps: balanced, or where their files are."""
        if self.clients.homes is not None:
            silos = range(self.topology.num_silos)
            return [[client for client, home in enumerate(self.clients.homes) if home == silo] for silo in silos]
        return assign_clients(range(len(self.clients)), self.clients.sizes.tolist(), self.topology.silo_sizes)

    def round(self, index: int) -> Round:
        """Return the round of this index, equal on every rank."""
        return Round(index, self.seed, self.client_sampling.sample(len(self.training_sets), self.seed, index))

    def evaluates(self, index: int) -> bool:
        """Return whether the round of this index ends with an evaluation."""
        return (index + 1) % self.evaluate_every == 0 or index + 1 == self.rounds

    def may_evaluate(self, index: int) -> bool:
        """Return whether the round of this index ends with an evaluation, if the run may end with it."""
        return self.evaluates(index) or self.stop.max_training_seconds is not None

    def saves(self, index: int) -> bool:
        """Return whether the round of this index ends with a checkpoint."""
        return (index + 1) % self.save_every == 0 or index + 1 == self.rounds

    def assignment_digest(self, index: int) -> str:
        """Return a digest of the assignment of clients to silos in the round of this index."""
        return f"{derive_seed(str(self.assignments(self.round(index)))):016x}"[-8:]

    def assignments(self, round: Round) -> list[list[int]]:
        """Return the clients that each silo trains in a round; state and files stay where they are."""
        is_bound = self.algorithm.keeps_client_state or self.clients.homes is not None
        if not is_bound:
            return assign_clients(round.cohort, self.training_sizes, self.topology.silo_sizes)
        members = set(round.cohort)
        return [[client for client in home if client in members] for home in self.training_homes]

    @cached_property
    def training_homes(self) -> list[list[int]]:
        """The clients whose state each silo keeps; if all are trained as one, the first silo has it."""
        if len(self.training_sets) == len(self.clients):
            return self.homes
        return [[0], *([] for _ in range(self.topology.num_silos - 1))]
