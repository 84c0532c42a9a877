"""A run: all choices, as one value that the loop reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer.algorithms import Algorithm
from trainer.algorithms.base import Setting
from trainer.algorithms.round import Round
from trainer.checkpoint.format import DTYPES, unsavable
from trainer.data import Clients, DataSplits, ExampleWeights, fingerprint
from trainer.data.client_sampling.sampling import AllClients, ClientSampler
from trainer.data.loading.prefetch import CacheOnGpu, check_cache_on_gpu
from trainer.data.loading.readers import LoadingOptions, check_loading
from trainer.data.loading.unit_counts import count_units
from trainer.data.transforms import Compose
from trainer.distributed import sharding
from trainer.distributed.compression import Uncompressed, UpdateCompression
from trainer.distributed.gradients import FullPrecisionReducer, GradientReducer
from trainer.distributed.options import SiloOptions
from trainer.distributed.topology import Topology
from trainer.loop.assignment import assign_clients
from trainer.loop.monitor import metric_errors
from trainer.loop.options import (
    CheckpointOptions,
    EvalOptions,
    MetricsOptions,
    RoundOptions,
    SampleOptions,
    TrainingOptions,
)
from trainer.loop.stopping import StopCriteria
from trainer.models.calling import call_model
from trainer.optim import Constant, GradientClipper, Schedule
from trainer.optim.optimizers import OptimizerFactory, optimizer_name
from trainer.optim.schedules import momentum_of
from trainer.optim.validation import is_elementwise
from trainer.tasks import Task
from trainer.utils.errors import ErrorCollector, raise_errors
from trainer.utils.seeding import derive_seed, seed_default_generators
from trainer.utils.text import format_value

ModelFactory = Callable[[], nn.Module]
GradientReducerFactory = Callable[[], GradientReducer]


@dataclass(frozen=True)
class Run:
    """A run, ready for `fit`: options, values and factories, of which training changes nothing.

    Replicas and silos are those of `topology`; everything else is equal on all ranks.

    Attributes:
        topology: the ranks, and the silos that they form.
        model: makes the initial model.
        task: loss and scores.
        data: the examples.
        clients: the client of each example.
        algorithm: how clients train and silos combine.
        optimizer: makes the clients' optimizer from a list of named parameters.
        rounds: number of rounds.
        seed: of all random streams.
        training: how clients train.
        round: how long a client's round is.
        stop: when the run is finished before its last round.
        eval: when and how the model is evaluated.
        sample: texts that a language model writes at every evaluation.
        checkpoint: when the state is saved.
        metrics: which metrics are reported.
        monitor: the metric that chooses the best round; None: the task's headline on the validation set.
        weights: of examples in the loss, and of clients in the combination; None: each example 1.
        transforms: of examples on their way to the model.
        schedule: factor on the learning rates, by the fraction of the run in [0, 1].
        client_sampling: the clients that take part in a round.
        update_compression: of vectors between silos.
        gradient_compression: makes what averages gradients inside a silo; without effect in silos of one replica.
        autocast: dtype of the forward pass; None: that of the parameters.
        cache_on_gpu: whether a GPU holds the training set in its memory; auto: if it is small.
        loading: how the items of torch Datasets are read.
        silo: how a silo holds the model; the topology has its division into parts.

    Raises:
        ValueError: lists the choices that cannot be combined.
    """

    topology: Topology
    model: ModelFactory
    task: Task
    data: DataSplits
    clients: Clients
    algorithm: Algorithm
    optimizer: OptimizerFactory
    rounds: int
    seed: int = 0
    training: TrainingOptions = TrainingOptions()
    round: RoundOptions = RoundOptions()
    stop: StopCriteria = StopCriteria()
    eval: EvalOptions = EvalOptions()
    sample: SampleOptions = SampleOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    metrics: MetricsOptions = MetricsOptions()
    monitor: str | None = None
    weights: ExampleWeights | None = None
    transforms: Compose = field(default_factory=Compose)
    schedule: Schedule = field(default_factory=Constant)
    client_sampling: ClientSampler = field(default_factory=AllClients)
    update_compression: UpdateCompression = field(default_factory=Uncompressed)
    gradient_compression: GradientReducerFactory = FullPrecisionReducer
    autocast: torch.dtype | None = None
    cache_on_gpu: CacheOnGpu = "auto"
    loading: LoadingOptions = LoadingOptions()
    silo: SiloOptions = SiloOptions()

    def __post_init__(self):
        errors = ErrorCollector()
        errors.collect(lambda: check_cache_on_gpu(self.data.train, self.topology.device, self.cache_on_gpu))
        errors.collect(lambda: check_loading(tuple(self.data.parts.values()), self.loading))
        errors.collect(lambda: self.algorithm.validate(self._setting()))
        errors.collect(lambda: raise_errors(metric_errors(self, self.task.scores)))
        errors.collect(self._check_patience)
        errors.collect(self._check_sync_rounds)
        errors.collect(self._check_samples)
        errors.collect(self._check_parts)
        errors.raise_any()

    @cached_property
    def clipper(self) -> GradientClipper:
        """The limits to a step's gradient, at work."""
        return GradientClipper(**asdict(self.training.clip))

    def make_model(self) -> nn.Module:
        """Make the initial model, with PyTorch's generators seeded by the run's seed: the same in each call."""
        seed_default_generators(self.topology.device, self.seed, "initial parameters")
        module = self.model()
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            inputs, _ = self.data.train.fetch(torch.arange(min(2, len(self.data.train))))
            with torch.no_grad():
                call_model(module.eval(), inputs)  # which tells the lazy layers their sizes
            module.train()
        return module

    def validate_model(self, module: nn.Module) -> None:
        """Raise ValueError if the model cannot be saved or divided, or a choice is about parameters that it lacks."""
        if found := unsavable(module.state_dict() | dict(module.named_buffers())):
            raise ValueError(
                f"model= has {', '.join(found)}, which checkpoints cannot hold.\n"
                f"  valid: dense tensors of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
            )
        if self.data.has_central and self.has_personal(module):
            raise ValueError(
                "the coordinator has examples of its own, and some parameters or buffers stay with their sites: it has "
                "no whole model.\n  start it without data.path, or set algorithm=fedavg"
            )
        sharding.validate_plan(module, self.topology)
        sharding.validate_initial(module)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if any(map(self.algorithm.is_shared, names)):
            return
        if not self.update_compression.is_identity:
            raise ValueError(
                f"update_compression={self.update_compression.name}, but algorithm.shared_params finds no "
                "parameter: clients train alone, and nothing goes between silos.\n"
                "  set update_compression=fp32, or algorithm=fedavg"
            )
        if self.training.ema_decay is not None:
            raise ValueError(
                f"ema_decay={self.training.ema_decay}, but algorithm.shared_params finds no parameter: there are no "
                "global weights to average.\n"
                "  set ema_decay=null, or algorithm=fedavg"
            )

    def has_personal(self, module: nn.Module) -> bool:
        """Return whether any trainable parameter, or buffer, of a model stays with its client."""
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        return not all(map(self.algorithm.is_shared, (*trainable, *(name for name, _ in module.named_buffers()))))

    def _setting(self) -> Setting:
        """Return the choices that the algorithm may be unable to work with."""
        return Setting(
            optimizer=self.optimizer,
            clip=self.clipper,
            silos=self.topology.num_silos,
            clients_per_round=self.client_sampling.round_size(len(self.clients)),
            sampling=None if self.client_sampling.takes_all else self.client_sampling.name,
            drops_stragglers=self.round.stragglers == "drop",
            finetuning_steps=self.eval.personal_steps,
            compression=None if self.update_compression.is_identity else self.update_compression.name,
            moves_momentum=momentum_of(self.schedule) is not None,
        )

    def _check_patience(self) -> None:
        stop = self.stop
        evaluations = -(-self.rounds // self.eval.every_rounds)
        # The first evaluation is progress, and the last one ends the run anyway.
        if stop.patience_evaluations is not None and stop.patience_evaluations > evaluations - 2:
            raise ValueError(
                f"stop.patience_evaluations={stop.patience_evaluations} with rounds={self.rounds} and "
                f"eval.every_rounds={self.eval.every_rounds}: with {evaluations} evaluations, patience cannot run "
                "out before the last.\n"
                f"  set stop.patience_evaluations to {max(evaluations - 2, 1)} or less, or more rounds, or evaluate "
                "more often"
            )

    def _check_sync_rounds(self) -> None:
        if self.round.sync_rounds and not self.client_sampling.takes_all:
            raise ValueError(
                f"round.sync_rounds={self.round.sync_rounds} with a cohort of some clients: their batches would be of "
                "different rounds.\n  set client_sampling=all, or round.sync_rounds=0"
            )

    def _check_parts(self) -> None:
        """Check that a step can be made by ranks that each have a part of the model."""
        dims = self.topology.dims
        if dims.num_parts == 1:
            return
        counts = {f"silo.{key}": count for key, count in asdict(dims).items() if count > 1}
        given, whole = (
            " ".join(f"{key}={count}" for key, count in counts.items()),
            " ".join(f"{key}=1" for key in counts),
        )
        errors: list[str] = []
        if not is_elementwise(self.optimizer):
            errors.append(
                f"optimizer={optimizer_name(self.optimizer)} with {given}: its step depends on whole matrices, or on "
                f"all gradients, and each rank has a part of them.\n  set optimizer=adamw, or {whole}"
            )
        if dims.tensor > 1 and self.training.compile_backend:
            errors.append(
                f"compile_backend={self.training.compile_backend} with silo.tensor={dims.tensor}: torch does not "
                "compile what tensor parallelism and FSDP2 do around a layer.\n"
                "  set compile_backend=null, or silo.shard in the place of silo.tensor"
            )
        if self.autocast == torch.float16:
            errors.append(
                f"precision=fp16 with {given}: a gradient that overflows on one rank would have to be known to the "
                f"others, before they step.\n  set precision=bf16, or {whole}"
            )
        if self.training.micro_batch_size == "auto" and not sharding.can_pass_alone():
            errors.append(
                f"micro_batch_size=auto with {given}: torch {torch.__version__} cannot continue after a pass that did "
                f"not fit into memory.\n  set a number, or install a newer torch; or set {whole}"
            )
        reducer = self.gradient_compression()
        if not reducer.takes_parts:
            errors.append(
                f"gradient_compression={type(reducer).__name__} with {given}: it compresses the gradient of the whole "
                f"model, and each rank gets the mean of a part.\n  set gradient_compression=bf16, or {whole}"
            )
        raise_errors(errors)

    @property
    def can_sample(self) -> bool:
        """Whether the model predicts tokens whose text is known."""
        return self.data.text_format is not None and self.task.unit_name == "token"

    def _check_samples(self) -> None:
        prompts, text_format = self.sample.prompts, self.data.text_format
        if prompts and not self.can_sample:
            raise ValueError(
                f"sample.prompts={format_value(list(prompts))}: the run predicts no tokens whose text is known.\n"
                "  set task=language_modelling, and data=text, data=chat, or data=tokens with data.tokenizer="
            )
        if text_format and not all(map(text_format.encode, prompts)):
            raise ValueError("sample.prompts= has a prompt without tokens\n  valid: prompts of one token or more")

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
    def unit_counts(self) -> Tensor | None:
        """The units of each training example that count in the loss, float32 [N]; None if the task ignores none."""
        return count_units(self.task, self.data.train)

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

    def sample_round(self, index: int) -> Round:
        """Return the round of this index with its clients, equal on every rank."""
        return Round(index, self.seed, self.client_sampling.sample(len(self.training_sets), self.seed, index))

    def evaluates(self, index: int) -> bool:
        """Return whether the round of this index ends with an evaluation."""
        return (index + 1) % self.eval.every_rounds == 0 or index + 1 == self.rounds

    def may_evaluate(self, index: int) -> bool:
        """Return whether the round of this index ends with an evaluation, if the run may end with it."""
        return self.evaluates(index) or self.stop.max_training_seconds is not None

    def saves(self, index: int) -> bool:
        """Return whether the round of this index ends with a checkpoint."""
        return (index + 1) % self.checkpoint.every_rounds == 0 or index + 1 == self.rounds

    def assignment_digest(self, index: int) -> str:
        """Return a digest of the assignment of clients to silos in the round of this index."""
        return f"{derive_seed(str(self.assignments(self.sample_round(index)))):016x}"[-8:]

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
