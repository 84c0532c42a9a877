"""What a run consists of: every choice, made, as one frozen value that the loop and its parts read."""

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
    """How much a client does in a round: local epochs, or a number of steps if that is given.

    epochs            a number, or (least, most): drawn anew for every client and round
    sync_rounds       the number of first rounds of one step: post-local SGD, Lin et al. 2020 (arXiv 1808.07217)
    deadline_seconds  after which a silo ends its round, wherever it is; None: never
    stragglers        the work of a client that had no time to do all of it: `keep` or `drop`
    """

    epochs: int | tuple[int, int] = 1
    steps: int | None = None
    sync_rounds: int = 0
    deadline_seconds: float | None = None
    stragglers: Stragglers = "keep"

    def num_steps(self, steps_per_epoch: int, round: Round, client: int) -> int:
        """The steps of a client in a round, if its epoch has so many."""
        if round.index < self.sync_rounds:
            return 1
        return self.steps or self._epochs(round, client) * steps_per_epoch

    def first_step(self, steps_per_epoch: int, earlier_rounds: int) -> int:
        """Where in a client's stream of batches its round begins, after so many in which it took part.

        Every round but the synchronous ones has room for the most that may be done in it: so this is a pure function.
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

    Raises ValueError when the algorithm cannot combine clients that are trained in this way.

    batch_size            examples per optimizer step of a silo, whatever its number of ranks; None: all of the client's
    micro_batch_size      examples that one rank puts through the model at once; None: its whole share of the batch;
                          auto: as many as all ranks have room for
    weights               of examples in the loss, and of clients in the combination; None: each example 1
    transforms            of examples on their way to the model
    stop                  when the run is finished before its last round
    cache_on_gpu          whether a GPU holds the training set in its memory; None: if it is small
    optimizer             makes the inner optimizer from a list of named parameters
    client_sampling       the clients that take part in a round
    update_compression    of numbers on their way between silos
    schedule              factor on the optimizer's learning rates by the run's progress in [0, 1]
    clip                  limits to a step's gradient
    ema_decay             decay of the weights' exponential moving average; None: there is none
    autocast              dtype of the forward pass's matrix products; None: that of the parameters
    compile_backend       torch.compile's for the model; None: it is not compiled
    gradient_compression  of the mean inside a silo; without effect in silos of one replica
    evaluate_every        rounds between evaluations; the last round is always evaluated
    save_every            rounds between checkpoints; the last round is always saved
    max_nonfinite_rounds  rounds in a row with clients left out, their numbers not being finite, that end the run
    per_client            the metrics of single clients: `full`, `scores` only, or `none`
    personal_steps        steps on its own examples after which each client's model is evaluated too; 0: it is not
    peak_flops            FLOP/s of the device of each rank, for the metric `mfu`; None: by the device's name
    measures_flops        whether the rate of large matrix products is measured at the start, for `measured_mfu`
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
                f"eval.every_rounds={self.evaluate_every}: of {evaluations} evaluations so many cannot be in "
                "vain before the last.\n"
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
        """What tells the examples, their clients and when these are there from others."""
        told = fingerprint(self.data, self.clients)
        present = self.client_sampling.fingerprint()
        return f"{told}-{derive_seed(present):016x}" if present else told

    @cached_property
    def homes(self) -> list[list[int]]:
        """The clients that each silo evaluates and keeps the state of: balanced by examples, or where these are."""
        if self.clients.homes is not None:
            silos = range(self.topology.num_silos)
            return [[client for client, home in enumerate(self.clients.homes) if home == silo] for silo in silos]
        return assign_clients(range(len(self.clients)), self.clients.sizes.tolist(), self.topology.silo_sizes)

    def round(self, index: int) -> Round:
        """The round of this index, equal on every rank."""
        return Round(index, self.seed, self.client_sampling.sample(len(self.training_sets), self.seed, index))

    def evaluates(self, index: int) -> bool:
        """Whether the round of this index ends with an evaluation."""
        return (index + 1) % self.evaluate_every == 0 or index + 1 == self.rounds

    def may_evaluate(self, index: int) -> bool:
        """Whether the round of this index may end with an evaluation, when it is known that the run ends with it."""
        return self.evaluates(index) or self.stop.max_training_seconds is not None

    def saves(self, index: int) -> bool:
        """Whether the round of this index ends with a checkpoint."""
        return (index + 1) % self.save_every == 0 or index + 1 == self.rounds

    def assignment_digest(self, index: int) -> str:
        """A word for who trains whom in the round of this index: equal words, equal assignments."""
        return f"{derive_seed(str(self.assignments(self.round(index)))):016x}"[-8:]

    def assignments(self, round: Round) -> list[list[int]]:
        """The clients that each silo trains in a round; a client with state, or a file, is trained where that is."""
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
