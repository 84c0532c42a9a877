"""Options of a run, in groups. The configuration has the same keys, which conf/config.yaml documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from trainer.utils.annotations import (
    OPTIONS,
    Count,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Span,
    predicate,
)

if TYPE_CHECKING:  # the command line reads the options without importing torch
    import torch

    from trainer.algorithms.round import Round

ScoreNames = Annotated[tuple[str, ...], Field(description="a list of the task's scores such as [auc,sensitivity]")]
NormType = Annotated[
    float, Field(allow_inf_nan=True, description="1 or 2 or inf"), predicate(lambda order: order in (1, 2, math.inf))
]


@dataclass(frozen=True, config=OPTIONS)
class ClipOptions:
    """Limits to a step's gradient: of each element, then of the norm of all together.

    Attributes:
        max_norm: largest norm of the gradient; None: any.
        norm_type: p of the p-norm: 1, 2 or infinity.
        max_value: largest magnitude of an element; None: any.
    """

    max_norm: PositiveFloat | None = None
    norm_type: NormType = 2.0
    max_value: PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TrainingOptions:
    """How clients train: the keys at the top of the configuration.

    Attributes:
        batch_size: examples per optimizer step of a silo, whatever its number of ranks; all: the client's training set.
        micro_batch_size: examples that one rank puts through the model at once; None: its whole share of the batch;
            auto: the largest number for which all ranks have room.
        clip: limits to a step's gradient.
        ema_decay: of the exponential moving average of the weights; None: there is none.
        compile_backend: torch.compile's for the model; None: it is not compiled.
        allow_unused: whether a batch may leave trainable parameters without a gradient.
        max_nonfinite_rounds: consecutive rounds with nonfinite clients that end the run.
    """

    batch_size: PositiveInt | Literal["all"] = 32
    micro_batch_size: PositiveInt | Literal["auto", None] = None
    clip: ClipOptions = ClipOptions()
    ema_decay: Fraction | None = None
    compile_backend: Literal["inductor", "aot_eager", None] = None
    allow_unused: bool = False
    max_nonfinite_rounds: PositiveInt = 3

    def batch_size_of(self, examples: int) -> int:
        """Return the batch size of a client with this number of training examples."""
        return examples if self.batch_size == "all" else self.batch_size


@dataclass(frozen=True, config=OPTIONS)
class RoundOptions:
    """The length of a client's round.

    Attributes:
        epochs: local epochs; or (least, most), from which the number is drawn for every client and round.
        steps: local steps, in place of epochs; None: epochs count.
        sync_rounds: number of first rounds of one step: post-local SGD, Lin et al. 2020 (arXiv 1808.07217).
        deadline_seconds: time after which a silo ends its round, whatever is left to do; None: never.
        stragglers: `keep` or `drop` the work of a client that had no time to finish it.
    """

    epochs: PositiveInt | Span = 1
    steps: PositiveInt | None = None
    sync_rounds: Count = 0
    deadline_seconds: Seconds | None = None
    stragglers: Literal["keep", "drop"] = "keep"

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


@dataclass(frozen=True, config=OPTIONS)
class EvalOptions:
    """When and how the model is evaluated.

    Attributes:
        every_rounds: rounds between evaluations; the last round is always evaluated.
        batch_size: examples that one rank evaluates at once.
        personal_steps: fine-tuning steps after which each client's model is evaluated too; 0: it is not.
    """

    every_rounds: PositiveInt = 1
    batch_size: PositiveInt = 1024
    personal_steps: Count = 0


@dataclass(frozen=True, config=OPTIONS)
class SampleOptions:
    """Samples of a language model, at every evaluation.

    Attributes:
        prompts: the beginnings that it continues; empty: there are no samples.
        tokens: most tokens of a sample.
        temperature: divides the logits; 0: the most likely token is taken.
    """

    prompts: Annotated[Sequence[str], Field(description="a list of texts such as ['To be']")] = ()
    tokens: PositiveInt = 128
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


@dataclass(frozen=True, config=OPTIONS)
class CheckpointOptions:
    """When the state is saved, by a run that has a Checkpointer.

    Attributes:
        every_rounds: rounds between checkpoints; the last round is always saved.
        every_seconds: seconds between checkpoints in the middle of a round; None: there are none but on preemption.
        keep_last: newest checkpoints to keep, besides the best.
    """

    every_rounds: PositiveInt = 1
    every_seconds: Seconds | None = None
    keep_last: PositiveInt = 2


@dataclass(frozen=True, config=OPTIONS)
class MetricsOptions:
    """Which metrics are reported.

    Attributes:
        per_client: those of single clients: `full`, `scores` only, or `none`.
        client_scores: scores that are computed for every client, besides the task's headline.
        every_steps: steps between metrics within a round; None: there are none but by round.
        peak_flops: FLOP/s of the device of each rank, for the metric `mfu`; auto: by the device's name.
        measure_flops: whether the rate of large matrix products is measured at the start, for `measured_mfu`; auto: on
            GPUs.
    """

    per_client: Literal["full", "scores", "none"] = "full"
    client_scores: ScoreNames = ()
    every_steps: PositiveInt | None = None
    peak_flops: Annotated[float, Field(ge=1)] | Literal["auto"] = "auto"
    measure_flops: bool | Literal["auto"] = "auto"

    def measures_flops(self, device: torch.device) -> bool:
        """Return whether the rate of matrix products is measured on this device."""
        return device.type == "cuda" if self.measure_flops == "auto" else self.measure_flops
