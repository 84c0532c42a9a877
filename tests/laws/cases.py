"""The table: every algorithm with the choices that go with it, and the state that the laws compare.

A new algorithm adds a row. All train a tiny model over 7 clients of unequal sizes, so that a law takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.runs import make_clients, run_of
from trainer.algorithms import (
    Algorithm,
    FedAvg,
    FedDyn,
    FedNova,
    FedOpt,
    Krum,
    Median,
    ModelAveraging,
    Scaffold,
    Streaming,
    Sync,
    TrimmedMean,
)
from trainer.algorithms.aggregation_rule import AggregationRule
from trainer.data import DataSplits, TensorSource
from trainer.data.client_sampling.sampling import ClientSampler
from trainer.distributed.compression import Int4, Int8, PowerSGD, TopK
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import FinalArtifacts, Metrics
from trainer.loop.evaluate import evaluate
from trainer.loop.options import RoundOptions
from trainer.loop.round import train_round
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.tasks import Classification

SIZES = [3, 12, 7, 20, 5, 9, 16]
FEATURES, CLASSES, TEST_EXAMPLES = 6, 3, 21

average = partial(torch.optim.SGD, lr=1.0, fused=True)
momentum = partial(torch.optim.SGD, lr=1.0, momentum=0.9, fused=True)
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True, fused=True)
adam = partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.99), eps=1e-3)


scaffold = partial(FedAvg, drift_correction=Scaffold())
fednova = partial(FedAvg, drift_correction=FedNova())
feddyn = partial(FedAvg, weighting="equal", drift_correction=FedDyn(0.5))


def robust(rule: AggregationRule, **slots: Any) -> partial[FedAvg]:
    """Return FedAvg with a robust rule."""
    return partial(FedAvg, weighting="equal", rule=rule, **slots)


@dataclass(frozen=True)
class Case:
    """An algorithm, and the choices of a run that belong to it."""

    algorithm: Callable[[], Algorithm]
    choices: dict[str, Any] = field(default_factory=dict)


CASES = {
    "sync": Case(Sync, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}),
    "fedavg": Case(partial(FedAvg, server=average)),
    "fedavg_momentum": Case(partial(FedAvg, server=momentum)),
    "fedavg_adam": Case(partial(FedAvg, server=adam)),
    "diloco": Case(
        partial(FedAvg, server=nesterov, weighting="equal", client_optimizer_state="keep"),
        {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
    ),
    "fedsgd": Case(partial(FedAvg, server=average), {"batch_size": "all", "round": RoundOptions(steps=1)}),
    "fedadam": Case(partial(FedAvg, server=partial(FedOpt, lr=0.05, rule="adam"))),
    "fedyogi": Case(partial(FedAvg, server=partial(FedOpt, lr=0.05, rule="yogi"))),
    "fedadagrad": Case(partial(FedAvg, server=partial(FedOpt, lr=0.05, rule="adagrad", betas=(0.0, 0.0)))),
    "fedprox": Case(partial(FedAvg, server=average, proximal_mu=0.5, weighting="capped", max_weight=10)),
    "bounded": Case(partial(FedAvg, server=average, max_update_norm=0.1)),
    "averaging": Case(ModelAveraging),
    "streaming": Case(
        partial(Streaming, server=nesterov, fragments=2, overlap_steps=1, alpha=0.5),
        {"optimizer": partial(torch.optim.AdamW, lr=0.01)},
    ),
    "delayed": Case(
        partial(
            Streaming, server=average, weighting="examples", client_optimizer_state="reset", overlap_steps=2, alpha=0.25
        )
    ),
    "scaffold": Case(scaffold, {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.5)}),
    "fednova": Case(partial(fednova, server=momentum), {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.5)}),
    "feddyn": Case(feddyn),
    "median": Case(robust(Median())),
    "trimmed_mean": Case(robust(TrimmedMean(0.2))),
    "krum": Case(robust(Krum(1, 2))),
    "int8": Case(partial(FedAvg, server=momentum), {"update_compression": Int8(8)}),
    "topk": Case(
        partial(FedAvg, server=average, weighting="equal", client_optimizer_state="keep"),
        {"update_compression": TopK(0.5), "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    ),
    "int4_scaffold": Case(scaffold, {"update_compression": Int4(8)}),
    "powersgd": Case(partial(FedAvg, server=average), {"update_compression": PowerSGD(1)}),
    "local": Case(
        partial(FedAvg, server=average, shared_params="$^", client_optimizer_state="keep"),
        {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    ),
}
FEDERATED = [name for name in CASES if name != "sync"]
COMBINED = [name for name in FEDERATED if name != "local"]
VOTING = [name for name in FEDERATED if CASES[name].algorithm().skips_nonfinite_clients]
AT_ONCE = [name for name in CASES if name not in ("streaming", "delayed")]  # every round applies its whole update
# Compression depends on which clients share a silo.
EXACT = [name for name in FEDERATED if "update_compression" not in CASES[name].choices]


@dataclass(frozen=True)
class Only(ClientSampler):
    """A client sampler that returns the clients listed for each round; the last list applies to all later rounds."""

    rounds: tuple[tuple[int, ...], ...]

    def sample(self, clients: int, seed: int, index: int) -> tuple[int, ...]:
        return self.rounds[min(index, len(self.rounds) - 1)]


@dataclass
class Records:
    """A logger that keeps the metrics of every round, and the result."""

    rounds: list[Metrics] = field(default_factory=list)
    result: Metrics | None = None
    exhibits: FinalArtifacts = field(default_factory=FinalArtifacts)

    def log_round(self, metrics: Metrics) -> None:
        self.rounds.append(metrics)

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        self.result, self.exhibits = result, artifacts

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Outcome:
    """The result of a run on one rank: leaves by name, and the metrics of its rounds."""

    model: dict[str, Any]
    algorithm: dict[str, Any]
    clients: dict[int, dict[str, Any]]
    rounds: list[Metrics]


def tiny_model(seed: int = 0) -> nn.Module:
    """Return two layers with a Tanh between, from 6 features to 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def tiny_data(examples: int, dtype: torch.dtype = torch.float64) -> DataSplits:
    """Return random examples of 3 classes that a model can learn."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples + TEST_EXAMPLES, FEATURES, generator=generator, dtype=dtype)
    targets = (inputs[:, :CLASSES] + 0.3 * inputs[:, CLASSES:]).argmax(1)
    train, test = (TensorSource(inputs[part], targets[part]) for part in (slice(examples), slice(examples, None)))
    return DataSplits(train, test, CLASSES)


def case_run(topology: Topology, name: str, choices: Mapping[str, Any]) -> Run:
    """Return the run of a row of the table, in float64 so that tolerances can be sharp.

    `choices` override those of the row; `sizes` among them are the clients' numbers of examples.
    """
    overrides = dict(choices)
    sizes = overrides.pop("sizes", SIZES)
    defaults: dict[str, Any] = {
        "module": tiny_model().double(),
        "task": Classification(),
        "data": tiny_data(sum(sizes)),
        "clients": make_clients(sizes, TEST_EXAMPLES),
        "algorithm": CASES[name].algorithm(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "rounds": 2,
        "batch_size": 4,
    }
    return run_of(topology, defaults | CASES[name].choices | overrides)


def silos_of(name: str, silos: SiloSpec) -> SiloSpec:
    """Return the silos that the algorithm supports: Sync has one."""
    return 1 if name == "sync" else silos


def train(name: str, silos: SiloSpec, choices: Mapping[str, Any]) -> Outcome:
    """Run a row of the table to its end."""
    with distributed(silos_of(name, silos)) as topology:
        run = case_run(topology, name, choices)
        state = TrainState(run)
        rounds = [one_round(state, index) for index in range(run.rounds)]
        return outcome(state, rounds)


def one_round(state: TrainState, index: int) -> Metrics:
    """Return the metrics of a round, with those of an evaluation if one is due."""
    metrics = train_round(state, state.run.sample_round(index))
    return metrics | evaluate(state) if state.run.evaluates(index) else metrics


def outcome(state: TrainState, rounds: list[Metrics]) -> Outcome:
    """Return a copy of the state."""
    clients = {client: leaves(kept) for client, kept in state.trainer.clients.states.items()}
    algorithm = leaves(state.algorithm.state_dict() | state.algorithm.sharded_state_dict())
    # The metrics of pending sums count steps and clients, in which equal runs may differ.
    algorithm = {name: leaf for name, leaf in algorithm.items() if not name.startswith("streaming/")}
    return Outcome(leaves(state.model.shared_state()), algorithm, clients, rounds)


def every_client(outcomes: list[Outcome]) -> dict[int, dict[str, Any]]:
    """Return the clients' states of all ranks."""
    return {client: kept for one in outcomes for client, kept in one.clients.items()}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their paths; tensors are copied."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = value.detach().clone() if isinstance(value, Tensor) else value
    return found


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Assert that both have the same names with the same bits."""
    assert list(ours) == list(theirs)
    apart = [name for name in ours if not _same(ours[name], theirs[name])]
    assert not apart, "\n".join(f"{name}: {ours[name]} is not {theirs[name]}" for name in apart[:3])


def assert_close(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], tolerance: float = 1e-12) -> None:
    """Assert that both have the same names with values that agree to rounding."""
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(
            np.asarray(ours[name]), np.asarray(theirs[name]), rtol=tolerance, atol=tolerance, err_msg=str(name)
        )


def figures(metrics: Metrics) -> Metrics:
    """Return the metrics that depend on the training, and not on the machine."""
    machine = (
        "seconds",
        "examples_per_second",
        "tokens_per_second",
        "mfu",
        "memory/",
        "slowest/",
        "bytes_between_silos",
    )
    return {name: value for name, value in metrics.items() if not name.startswith(machine)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
