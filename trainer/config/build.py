"""From a configuration to the objects of a run; no configuration goes further down."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.algorithms import Algorithm
from trainer.algorithms.base import Setting
from trainer.config.compatibility import check_fit, check_labels, check_rates, check_shared
from trainer.config.instantiate import Faults, each, guard, instantiate, name_of, object_of
from trainer.config.schema import Config, Leaf
from trainer.data import Apart, Clients, Natural, Splits, clients_apart, natural_clients
from trainer.data.client_sampling.sampling import Cohort
from trainer.data.loading.class_weights import weigh
from trainer.data.loading.silo_files import read_apart
from trainer.data.transforms import Chain, skewed
from trainer.distributed.compression import Full, Uplink
from trainer.distributed.topology import Topology
from trainer.loggers import Sink
from trainer.loop.run import RoundLength, Run
from trainer.loop.stopping import Stop
from trainer.models.pretrained import freeze, load_weights
from trainer.optim import Clip, Grouped
from trainer.optim.optimizers import OptimizerFactory, has_fused_step
from trainer.tasks import VERBS, Task
from trainer.utils.seeding import default_generators, derive
from trainer.utils.text import shown

SLOTS = (
    "schedule",
    "client_sampling",
    "update_compression",
    "gradient_compression",
)  # of a Run, that are made as they are


def build(config: Config, topology: Topology) -> Run:
    """The Run that the configuration describes, for this rank; ValueError lists everything that is wrong with it."""
    faults = Faults()
    splits = faults.collect(lambda: _data(config, topology))
    task = faults.collect(lambda: _task(config))
    algorithm = faults.collect(lambda: _algorithm(config))
    slots = {slot: faults.collect(partial(instantiate, slot, getattr(config, slot))) for slot in SLOTS}
    optimizer = faults.collect(lambda: _inner_optimizer(config.optimizer, topology.device))
    clip = faults.collect(lambda: Clip(config.clip.max_norm, float(config.clip.norm_type), config.clip.max_value))
    module = faults.collect(lambda: _model(config, topology))
    transforms = splits and faults.collect(lambda: _transforms(config, splits))
    dealt = splits and faults.collect(lambda: _dealt(config, splits, topology))
    weights = task and dealt and faults.collect(lambda: weigh(task, *dealt, topology=topology))
    faults.collect(lambda: _check_batch_size(config, topology))
    if algorithm and optimizer and clip and dealt and all(slots.values()):
        setting = _setting(
            config, topology, optimizer, clip, slots["client_sampling"], slots["update_compression"], len(dealt[1])
        )
        faults.collect(lambda: algorithm.validate(setting))
    _check_together(faults, config, algorithm, optimizer, module, splits, task)
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
        weights=weights,
        transforms=transforms,
        clip=clip,
        measures_flops=_measures_flops(config, topology),
        **slots,
        **_told(config),
    )
    guard("client_sampling", config.client_sampling, lambda: run.round(0))
    return run


def _told(config: Config) -> dict[str, Any]:
    """What of a Run the configuration says in so many words."""
    return dict(
        rounds=config.rounds,
        batch_size=None if config.batch_size == "all" else int(config.batch_size),
        micro_batch_size=config.micro_batch_size,
        length=_round_length(config),
        stop=Stop(config.stop.metric_target, config.stop.patience_evaluations, config.stop.max_training_seconds),
        ema_decay=config.ema_decay,
        autocast=getattr(torch, config.precision.autocast) if config.precision.autocast else None,
        compile_backend=config.compile_backend,
        seed=config.seed,
        evaluate_every=config.eval.every_rounds,
        evaluation_batch_size=config.eval.batch_size,
        save_every=config.checkpoint.every_rounds,
        per_client=config.metrics.per_client,
        max_nonfinite_rounds=config.max_nonfinite_rounds,
        personal_steps=config.eval.personal_steps,
        peak_flops=None if config.metrics.peak_flops == "auto" else float(config.metrics.peak_flops),
        cache_on_gpu=None if config.data["cache_on_gpu"] == "auto" else config.data["cache_on_gpu"],
    )


def _check_together(faults: Faults, config: Config, *pieces: Any) -> None:
    """Collects what is wrong with pieces that go together; those that could not be made are None."""
    algorithm, optimizer, module, splits, task = pieces
    if algorithm and module:
        faults.collect(lambda: check_shared(algorithm, module, config.algorithm))
    if optimizer and module:
        faults.collect(lambda: check_rates(optimizer, module))
    if splits and task and module:
        faults.collect(lambda: check_fit(module, task, splits, config.model))


def _setting(
    config: Config,
    topology: Topology,
    optimizer: OptimizerFactory,
    clip: Clip,
    sampler: Cohort,
    compression: Uplink,
    clients: int,
) -> Setting:
    """What the algorithm may be unable to work with, before there is a Run."""
    return Setting(
        optimizer=optimizer,
        clip=clip,
        silos=topology.num_silos,
        clients_per_round=sampler.round_size(clients),
        sampling=None if sampler.takes_all else type(sampler).__name__.lower(),
        drops_stragglers=config.round.stragglers == "drop",
        finetuning_steps=config.eval.personal_steps,
        compression=None if isinstance(compression, Full) else compression.name,
    )


def build_clients(config: Config, topology: Topology) -> tuple[Splits, Clients]:
    """The data set that the configuration describes, and its clients; a collective only where there is a world."""
    return _dealt(config, _data(config, topology), topology)


def build_sinks(config: Config, folder: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """Where figures go by the user's wish, each told the run folder and the configuration, flat."""
    told = {"folder": folder, "settings": settings}
    return list(each("loggers", config.loggers, **told).values())


def _data(config: Config, topology: Topology) -> Splits:
    files, leaf = config.data["files"], config.data
    if files is None:
        return _splits(leaf)
    if leaf.get("path") is not None:
        raise ValueError(f"data.path={leaf['path']} and data.files={shown(files)}\n  set one of them")
    return read_apart(files, lambda file: _splits(leaf | {"path": file}), topology)


def _splits(leaf: Leaf) -> Splits:
    splits = instantiate("data", leaf)
    if not isinstance(splits, Splits):
        raise ValueError(f"data={leaf['_target_']} gave a {name_of(splits)}.\n  valid: trainer.data.Splits")
    check_labels(splits)
    return splits


def _transforms(config: Config, splits: Splits) -> Chain:
    chain = Chain(each("transforms", config.transforms), splits.classes, config.channels_last)
    if faults := chain.faults(*splits.train.fetch(torch.arange(1))):
        raise ValueError("\n".join(faults))
    return chain


def _task(config: Config) -> Task:
    task = instantiate("task", config.task)
    if missing := [verb for verb in VERBS if not hasattr(task, verb)]:
        raise ValueError(
            f"task={config.task['_target_']} gave a {name_of(task)} without {', '.join(missing)}.\n"
            "  valid: an object with all the verbs of trainer.tasks.Task"
        )
    return task


def _dealt(config: Config, splits: Splits, topology: Topology) -> tuple[Splits, Clients]:
    """The clients, and the data set as they have it."""
    clients = _clients(config, splits, topology)
    return skewed(splits, clients, each("client_shift", config.client_shift), config.seed), clients


def _clients(config: Config, splits: Splits, topology: Topology) -> Clients:
    partition = instantiate("partition", config.partition)
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
    clients: Clients = guard("partition", config.partition, deal)
    return clients.hold_out(config.data["validation"], config.seed)


def _algorithm(config: Config) -> Algorithm:
    make = guard("algorithm", config.algorithm, lambda: object_of(config.algorithm))
    if "server" not in signature(make).parameters:
        return instantiate("algorithm", config.algorithm)
    if config.server["_target_"].endswith(".Muon"):
        raise ValueError(
            f"server={config.server['_target_']}: the server moves one long vector, and Muon needs matrices.\n"
            "  set server=average, momentum, nesterov or adam"
        )
    server = _optimizer("server", config.server)
    return instantiate("algorithm", config.algorithm, ("server",), server=_tried("server", config.server, server))


def _inner_optimizer(leaf: Leaf, device: torch.device) -> Grouped:
    multipliers = tuple((name, float(factor)) for name, factor in leaf.get("lr_multipliers", []))
    step = _optimizer("optimizer", leaf)
    if not {"fused", "foreach"} & leaf.keys() and has_fused_step(object_of(leaf), device):
        step = partial(step, fused=True)
    make = Grouped(step, leaf.get("exclude_norm_bias_decay", False), multipliers)
    _tried("optimizer", leaf, make)
    return make


def _optimizer(key: str, leaf: Leaf) -> OptimizerFactory:
    return instantiate(key, leaf, ("params",), _partial_=True)


def _tried(key: str, leaf: Leaf, make: OptimizerFactory) -> OptimizerFactory:
    # Its arguments are checked now, on a parameter of its own, not in the middle of a start.
    guard(key, leaf, lambda: make([nn.Parameter(torch.zeros(1))]))
    return make


def _model(config: Config, topology: Topology) -> nn.Module:
    for generator in default_generators(topology.device):
        generator.manual_seed(derive(config.seed, "initial parameters"))
    module = instantiate("model", config.model)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model={config.model['_target_']} gave a {name_of(module)}.\n  valid: a torch.nn.Module")
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


def _measures_flops(config: Config, topology: Topology) -> bool:
    wish = config.metrics.measure_flops
    return topology.device.type == "cuda" if wish == "auto" else bool(wish)


def _round_length(config: Config) -> RoundLength:
    given = config.round
    epochs = given.epochs if isinstance(given.epochs, int) else (given.epochs[0], given.epochs[1])
    return RoundLength(epochs, given.steps, given.sync_rounds, given.deadline_seconds, given.stragglers)
