"""From a configuration to the objects of a run: the only user of `instantiate`; no configuration goes further down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from torch import nn

from trainer.algorithms import Algorithm
from trainer.config import Config, Leaf
from trainer.data import Clients, Splits, as_source, natural_clients
from trainer.data.partition import Natural
from trainer.randomness import default_generators, derive
from trainer.run import RoundLength, Run
from trainer.tasks import Task
from trainer.topology import Topology


def build(config: Config, topology: Topology) -> Run:
    """The Run that the configuration describes, for this rank; ValueError lists everything that is wrong with it."""
    faults = Faults()
    splits = faults.collect(lambda: _data(config))
    task = faults.collect(lambda: _instantiate("task", config.task))
    algorithm = faults.collect(lambda: _algorithm(config, topology))
    schedule = faults.collect(lambda: _instantiate("schedule", config.schedule))
    cohort = faults.collect(lambda: _instantiate("cohort", config.cohort))
    optimizer = faults.collect(lambda: _optimizer("optimizer", config.optimizer))
    module = faults.collect(lambda: _model(config, topology))
    clients = splits and faults.collect(lambda: _clients(config, splits, topology))
    faults.collect(lambda: _check_batch_size(config, topology))
    if splits and task and module:
        faults.collect(lambda: check_fit(module, task, splits))
    faults.raise_any()
    run = Run(
        topology=topology,
        module=module,
        task=task,
        data=splits,
        clients=clients,
        algorithm=algorithm,
        optimizer=optimizer,
        rounds=config.rounds,
        batch_size=None if config.batch_size == "all" else int(config.batch_size),
        micro_batch_size=config.micro_batch_size,
        length=RoundLength(config.round.epochs, config.round.steps),
        schedule=schedule,
        cohort=cohort,
        clip_norm=config.clip_norm,
        autocast=getattr(torch, config.precision.autocast) if config.precision.autocast else None,
        seed=config.seed,
        evaluate_every=config.eval.every,
        evaluation_batch_size=config.eval.batch_size,
        save_every=config.checkpoint.every,
        per_client=config.report.per_client,
    )
    _guard("cohort", config.cohort, lambda: run.round(0))
    return run


class Faults:
    """Collects what is wrong, so that it can be said all at once."""

    def __init__(self):
        self.messages: list[str] = []

    def collect(self, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and its ValueError remembered, if it fails."""
        try:
            return make()
        except ValueError as error:
            self.messages.append(str(error))
            return None

    def raise_any(self) -> None:
        if self.messages:
            raise ValueError("\n".join(self.messages))


@torch.no_grad()
def check_fit(module: nn.Module, task: Task, data: Splits) -> None:
    """Raises ValueError when the model cannot take the data, or its output cannot be judged by the task."""
    _check_labels(data)
    inputs, targets = data.train.fetch(torch.arange(min(2, len(data.train))))
    try:
        outputs = module.eval()(inputs)
    except (RuntimeError, TypeError, IndexError) as error:
        name, shape, reason = type(module).__name__, list(inputs.shape[1:]), str(error).split("\n")[0]
        hint = f"\n  set model.vocabulary={data.classes}" if isinstance(error, IndexError) and data.classes else ""
        raise ValueError(f"model={name} cannot take examples of shape {shape}: {reason}{hint}") from error
    finally:
        module.train()
    if fault := task.fault(outputs, targets, data.classes):
        raise ValueError(f"model={type(module).__name__} does not fit task={type(task).__name__}: {fault}")


def _check_labels(data: Splits) -> None:
    for part, source in (("training", data.train), ("test", data.test)):
        if data.classes and source.labels is not None and len(source.labels):
            least, most = int(source.labels.min()), int(source.labels.max())
            if least < 0 or most >= data.classes:
                raise ValueError(
                    f"data= has label {least if least < 0 else most} among its {part} examples, "
                    f"but {data.classes} classes.\n  valid: 0 to {data.classes - 1}"
                )


def _data(config: Config) -> Splits:
    splits = _instantiate("data", {key: value for key, value in config.data.items() if key != "validation"})
    if not isinstance(splits, Splits):
        raise ValueError(
            f"data={config.data['_target_']} gave a {type(splits).__name__}.\n  valid: trainer.data.Splits"
        )
    return replace(splits, train=as_source(splits.train), test=as_source(splits.test))


def _clients(config: Config, splits: Splits, topology: Topology) -> Clients:
    partition = _instantiate("partition", config.partition)
    count = topology.num_silos
    if config.clients != "auto":
        count = int(config.clients)
    elif isinstance(partition, Natural):
        count = natural_clients(splits.train)
    if count < topology.num_silos:
        raise ValueError(
            f"clients={count} are fewer than the {topology.num_silos} silos.\n"
            f"  valid: {topology.num_silos} or more; or fewer silos"
        )
    split = partial(partition.split, splits.train, splits.test, count, config.seed)
    clients: Clients = _guard("partition", config.partition, split)
    return clients.hold_out(config.data["validation"], config.seed)


def _algorithm(config: Config, topology: Topology) -> Algorithm:
    if config.algorithm["_target_"].endswith(".Sync"):
        if topology.num_silos > 1:
            raise ValueError(
                f"silos={topology.num_silos} with algorithm=sync: it keeps one silo in step and combines nothing.\n"
                "  set silos=1, or algorithm=fedavg"
            )
        return _instantiate("algorithm", config.algorithm)
    return _instantiate("algorithm", config.algorithm, server=_optimizer("server", config.server))


def _optimizer(key: str, leaf: Leaf) -> Callable[..., torch.optim.Optimizer]:
    make = _instantiate(key, leaf, _partial_=True)
    # Its arguments are checked now, on a parameter of its own, not in the middle of a start.
    _guard(key, leaf, lambda: make([nn.Parameter(torch.zeros(1))]))
    return make


def _model(config: Config, topology: Topology) -> nn.Module:
    for generator in default_generators(topology.device):
        generator.manual_seed(derive(config.seed, "initial parameters"))
    return _instantiate("model", config.model)


def _check_batch_size(config: Config, topology: Topology) -> None:
    largest = max(topology.silo_sizes)
    if config.batch_size != "all" and int(config.batch_size) < largest:
        raise ValueError(
            f"batch_size={config.batch_size} is smaller than the {largest} replicas of a silo: "
            f"it counts the examples of the whole silo.\n  valid: {largest} or more, or all"
        )


def _instantiate(key: str, leaf: Leaf, **arguments: Any) -> Any:
    return _guard(key, leaf, lambda: hydra.utils.instantiate(leaf, _convert_="all", **arguments))


def _guard(key: str, leaf: Leaf, make: Callable[[], Any]) -> Any:
    """What `make` returns; what a user did wrong in the leaf becomes a ValueError that names the key."""
    try:
        return make()
    except (InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        if isinstance(cause, TypeError) and "argument '" not in reason:
            reason = "a value is of the wrong type"
        elif isinstance(cause, ValueError) and (f"{key}=" in reason or f"{key}." in reason):
            raise ValueError(str(cause)) from error
        given = ", ".join(f"{key}.{name}={value}" for name, value in leaf.items() if name != "_target_")
        raise ValueError(f"{key}={leaf['_target_']}: {reason}" + (f"\n  given: {given}" if given else "")) from error
