"""From a configuration to the objects of a run: the only user of `instantiate`; no configuration goes further down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException
from torch import nn

from trainer.algorithms import Algorithm
from trainer.algorithms.algorithm import MakeOptimizer
from trainer.arguments import argument_faults
from trainer.checks import check_fit, check_labels, check_rates, check_shared
from trainer.cohort import All, Cohort
from trainer.config import Config, Leaf, for_target, given, shown
from trainer.data import Apart, Clients, Natural, Splits, clients_apart, natural_clients
from trainer.metrics import Sink
from trainer.optim import Clip, Grouped
from trainer.preprocess import Chain, skewed
from trainer.randomness import default_generators, derive
from trainer.run import RoundLength, Run
from trainer.sites import read_apart
from trainer.tasks import VERBS, Task
from trainer.topology import Topology
from trainer.weighing import weigh
from trainer.weights import freeze, load_weights

SLOTS = ("schedule", "cohort", "uplink", "gradients")  # of a Run, that are made as they are


def build(config: Config, topology: Topology) -> Run:
    """The Run that the configuration describes, for this rank; ValueError lists everything that is wrong with it."""
    faults = Faults()
    splits = faults.collect(lambda: _data(config, topology))
    task = faults.collect(lambda: _task(config))
    algorithm = faults.collect(lambda: _algorithm(config, topology))
    slots = {slot: faults.collect(partial(_instantiate, slot, getattr(config, slot))) for slot in SLOTS}
    cohort = slots["cohort"]
    optimizer = faults.collect(lambda: _inner_optimizer(config.optimizer))
    clip = faults.collect(lambda: Clip(config.clip_norm, float(config.clip_norm_order), config.clip_value))
    module = faults.collect(lambda: _model(config, topology))
    preprocess = splits and faults.collect(lambda: _preprocess(config, splits))
    dealt = splits and faults.collect(lambda: _dealt(config, splits, topology))
    weights = task and dealt and faults.collect(lambda: weigh(task, *dealt, topology=topology))
    faults.collect(lambda: _check_batch_size(config, topology))
    _check_together(faults, config, algorithm, cohort, optimizer, module, splits, task)
    faults.raise_any()
    data, clients = dealt
    run = Run(
        topology=topology,
        module=module,
        task=task,
        data=data,
        clients=clients,
        algorithm=algorithm,
        optimizer=optimizer,
        rounds=config.rounds,
        batch_size=None if config.batch_size == "all" else int(config.batch_size),
        micro_batch_size=config.micro_batch_size,
        weights=weights,
        preprocess=preprocess,
        length=_round_length(config),
        clip=clip,
        autocast=getattr(torch, config.precision.autocast) if config.precision.autocast else None,
        compile=config.compile,
        seed=config.seed,
        evaluate_every=config.eval.every,
        evaluation_batch_size=config.eval.batch_size,
        save_every=config.checkpoint.every,
        per_client=config.report.per_client,
        max_bad_rounds=config.max_bad_rounds,
        personal_steps=config.eval.personal_steps,
        **slots,
    )
    _guard("cohort", config.cohort, lambda: run.round(0))
    return run


def _check_together(faults: Faults, config: Config, *pieces: Any) -> None:
    """Collects what is wrong with pieces that go together; those that could not be made are None."""
    algorithm, cohort, optimizer, module, splits, task = pieces
    if algorithm and cohort:
        faults.collect(lambda: _check_cohort(algorithm, cohort))
    if algorithm and module:
        faults.collect(lambda: check_shared(algorithm, module, config.algorithm))
    if optimizer and module:
        faults.collect(lambda: check_rates(optimizer, module))
    if splits and task and module:
        faults.collect(lambda: check_fit(module, task, splits, config.model))


def build_clients(config: Config, topology: Topology) -> tuple[Splits, Clients]:
    """The data set that the configuration describes, and its clients; a collective only where there is a world."""
    return _dealt(config, _data(config, topology), topology)


def build_sinks(config: Config, folder: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """Where figures go by the user's wish, each told the run folder and the configuration, flat."""
    told = {"folder": folder, "settings": settings}
    return list(_each("sinks", config.sinks, **told).values())


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


def _check_cohort(algorithm: Algorithm, cohort: Cohort) -> None:
    if algorithm.pools_data and not isinstance(cohort, All):
        raise ValueError(
            f"cohort={_name(cohort).lower()} with algorithm={_name(algorithm).lower()}: it trains the examples of all "
            "clients as those of one, so there are none to draw from.\n  set cohort=all, or algorithm=fedavg"
        )


def _data(config: Config, topology: Topology) -> Splits:
    files, leaf = config.data["files"], config.data
    if files is None:
        return _splits(leaf)
    if leaf.get("path") is not None:
        raise ValueError(f"data.path={leaf['path']} and data.files={shown(files)}\n  set one of them")
    return read_apart(files, lambda file: _splits(leaf | {"path": file}), topology)


def _splits(leaf: Leaf) -> Splits:
    splits = _instantiate("data", leaf)
    if not isinstance(splits, Splits):
        raise ValueError(f"data={leaf['_target_']} gave a {_name(splits)}.\n  valid: trainer.data.Splits")
    check_labels(splits)
    return splits


def _preprocess(config: Config, splits: Splits) -> Chain:
    chain = Chain(_each("preprocess", config.preprocess), splits.classes)
    if faults := chain.faults(*splits.train.fetch(torch.arange(1))):
        raise ValueError("\n".join(faults))
    return chain


def _task(config: Config) -> Task:
    task = _instantiate("task", config.task)
    if missing := [verb for verb in VERBS if not hasattr(task, verb)]:
        raise ValueError(
            f"task={config.task['_target_']} gave a {_name(task)} without {', '.join(missing)}.\n"
            "  valid: an object with all the verbs of trainer.tasks.Task"
        )
    return task


def _dealt(config: Config, splits: Splits, topology: Topology) -> tuple[Splits, Clients]:
    """The clients, and the data set as they have it."""
    clients = _clients(config, splits, topology)
    return skewed(splits, clients, _each("skew", config.skew), config.seed), clients


def _clients(config: Config, splits: Splits, topology: Topology) -> Clients:
    partition = _instantiate("partition", config.partition)
    wanted = None if config.clients == "auto" else int(config.clients)
    if isinstance(splits.train, Apart):
        count, deal = len(splits.train.homes), partial(clients_apart, splits, partition, wanted)
    else:
        count = wanted or (natural_clients(splits.train) if isinstance(partition, Natural) else topology.num_silos)
        deal = partial(partition.split, splits.train, splits.test, count, config.seed)
    if count < topology.num_silos:
        raise ValueError(
            f"clients={count} are fewer than the {topology.num_silos} silos.\n"
            f"  valid: {topology.num_silos} or more; or fewer silos"
        )
    clients: Clients = _guard("partition", config.partition, deal)
    return clients.hold_out(config.data["validation"], config.seed)


def _algorithm(config: Config, topology: Topology) -> Algorithm:
    if config.algorithm["_target_"].endswith(".Sync") and topology.num_silos > 1:
        raise ValueError(
            f"silos={topology.num_silos} with algorithm=sync: it keeps one silo in step and combines nothing.\n"
            "  set silos=1, or algorithm=fedavg"
        )
    make = _guard("algorithm", config.algorithm, lambda: hydra.utils.get_object(config.algorithm["_target_"]))
    if "server" not in signature(make).parameters:
        return _instantiate("algorithm", config.algorithm)
    if config.server["_target_"].endswith(".Muon"):
        raise ValueError(
            f"server={config.server['_target_']}: the server moves one long vector, and Muon needs matrices.\n"
            "  set server=average, momentum, nesterov or adam"
        )
    server = _optimizer("server", config.server)
    return _instantiate("algorithm", config.algorithm, ("server",), server=_tried("server", config.server, server))


def _inner_optimizer(leaf: Leaf) -> Grouped:
    rates = tuple((name, float(factor)) for name, factor in leaf.get("rates", []))
    make = Grouped(_optimizer("optimizer", leaf), leaf.get("no_decay", False), rates)
    _tried("optimizer", leaf, make)
    return make


def _optimizer(key: str, leaf: Leaf) -> MakeOptimizer:
    return _instantiate(key, leaf, ("params",), _partial_=True)


def _tried(key: str, leaf: Leaf, make: MakeOptimizer) -> MakeOptimizer:
    # Its arguments are checked now, on a parameter of its own, not in the middle of a start.
    _guard(key, leaf, lambda: make([nn.Parameter(torch.zeros(1))]))
    return make


def _model(config: Config, topology: Topology) -> nn.Module:
    for generator in default_generators(topology.device):
        generator.manual_seed(derive(config.seed, "initial parameters"))
    module = _instantiate("model", config.model)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model={config.model['_target_']} gave a {_name(module)}.\n  valid: a torch.nn.Module")
    faults = Faults()
    if (path := config.model.get("init")) is not None:
        faults.collect(lambda: load_weights(module, Path(path)))
    if (pattern := config.model.get("freeze")) is not None:
        faults.collect(lambda: freeze(module, pattern))
    faults.raise_any()
    return module


def _check_batch_size(config: Config, topology: Topology) -> None:
    largest = max(topology.silo_sizes)
    if config.batch_size != "all" and int(config.batch_size) < largest:
        raise ValueError(
            f"batch_size={config.batch_size} is smaller than the {largest} replicas of a silo: "
            f"it counts the examples of the whole silo.\n  valid: {largest} or more, or all"
        )


def _round_length(config: Config) -> RoundLength:
    given = config.round
    epochs = given.epochs if isinstance(given.epochs, int) else (given.epochs[0], given.epochs[1])
    return RoundLength(epochs, given.steps, given.synchronous, given.seconds, given.late)


def _instantiate(key: str, leaf: Leaf, ours: tuple[str, ...] = (), **options: Any) -> Any:
    """What the leaf describes; `ours` are the arguments that are not the user's."""
    leaf = for_target(key, leaf)

    def make() -> Any:
        if faults := argument_faults(key, leaf, hydra.utils.get_object(leaf["_target_"]), ours):
            raise ValueError("\n".join(faults))
        return hydra.utils.instantiate(leaf, _convert_="all", **options)

    return _guard(key, leaf, make)


def _each(key: str, leaves: dict[str, Leaf], **told: Any) -> dict[str, Any]:
    """What each of the leaves describes, `told` what is not the user's; all that is wrong is said at once."""
    faults = Faults()
    made = {
        name: faults.collect(partial(_instantiate, f"{key}.{name}", leaf, tuple(told), **told))
        for name, leaf in leaves.items()
    }
    faults.raise_any()
    return made


def _guard(key: str, leaf: Leaf, make: Callable[[], Any]) -> Any:
    """What `make` returns; what a user did wrong in the leaf becomes a ValueError that names the key."""
    try:
        return make()
    except (ImportError, InstantiationException, TypeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        reason = " ".join(str(cause).split())
        if isinstance(cause, TypeError) and "argument" not in reason:
            reason = "a value is of the wrong type"
        elif isinstance(cause, ValueError) and (f"{key}=" in reason or f"{key}." in reason):
            raise ValueError(str(cause)) from error
        raise ValueError(f"{key}={leaf['_target_']}: {reason}{given(key, leaf)}") from error


def _name(thing: object) -> str:
    return type(thing).__name__
