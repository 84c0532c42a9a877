"""Build the objects of a run from its configuration. The packages below know no configuration."""

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
from trainer.config.compatibility import check_labels, check_lr_multipliers, check_model_fits_data, check_shared_params
from trainer.config.instantiate import (
    ErrorCollector,
    annotate_errors,
    class_name,
    import_target,
    instantiate,
    instantiate_all,
)
from trainer.config.schema import ComponentConfig, Config
from trainer.data import Clients, DataSplits, count_natural_clients, per_client_partition
from trainer.data.client_sampling.sampling import ClientSampler
from trainer.data.loading.class_weights import apply_class_weights
from trainer.data.loading.silo_files import load_silo_files
from trainer.data.transforms import Compose, shift_clients
from trainer.distributed.compression import Uncompressed, UpdateCompression
from trainer.distributed.topology import Topology
from trainer.loggers import Logger
from trainer.loop.run import RoundLength, Run
from trainer.loop.stopping import StopCriteria
from trainer.models.pretrained import freeze, load_pretrained
from trainer.optim import GradientClipper, GroupedOptimizerFactory
from trainer.optim.optimizers import OptimizerFactory, has_fused_step
from trainer.tasks import REQUIRED_METHODS, Task
from trainer.utils.seeding import default_generators, derive_seed
from trainer.utils.text import format_value

# Components that a Run takes as they are instantiated.
COMPONENTS = ("schedule", "client_sampling", "update_compression", "gradient_compression")


def build(config: Config, topology: Topology) -> Run:
    """Build the Run of this rank.

    Raises:
        ValueError: lists every error in the configuration.
    """
    errors = ErrorCollector()
    splits = errors.collect(lambda: _data(config, topology))
    task = errors.collect(lambda: _task(config))
    algorithm = errors.collect(lambda: _algorithm(config))
    slots = {slot: errors.collect(partial(instantiate, slot, getattr(config, slot))) for slot in COMPONENTS}
    optimizer = errors.collect(lambda: _inner_optimizer(config.optimizer, topology.device))
    clip = errors.collect(
        lambda: GradientClipper(config.clip.max_norm, float(config.clip.norm_type), config.clip.max_value)
    )
    module = errors.collect(lambda: _model(config, topology))
    transforms = splits and errors.collect(lambda: _transforms(config, splits))
    partitioned = splits and errors.collect(lambda: _partitioned(config, splits, topology))
    weights = (
        task and partitioned and errors.collect(lambda: apply_class_weights(task, *partitioned, topology=topology))
    )
    errors.collect(lambda: _check_batch_size(config, topology))
    if algorithm and optimizer and clip and partitioned and all(slots.values()):
        setting = _setting(
            config,
            topology,
            optimizer,
            clip,
            slots["client_sampling"],
            slots["update_compression"],
            len(partitioned[1]),
        )
        errors.collect(lambda: algorithm.validate(setting))
    _check_together(errors, config, algorithm, optimizer, module, splits, task)
    errors.raise_any()
    data, clients = partitioned
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
        **_run_options(config),
    )
    annotate_errors("client_sampling", config.client_sampling, lambda: run.round(0))
    return run


def _run_options(config: Config) -> dict[str, Any]:
    """Return the fields of a Run that are plain values of the configuration."""
    return dict(
        rounds=config.rounds,
        batch_size=None if config.batch_size == "all" else int(config.batch_size),
        micro_batch_size=config.micro_batch_size,
        length=_round_length(config),
        stop=StopCriteria(
            config.stop.metric_target, config.stop.patience_evaluations, config.stop.max_training_seconds
        ),
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


def _check_together(errors: ErrorCollector, config: Config, *pieces: Any) -> None:
    """Collect the errors of components that do not fit each other; those that could not be made are None."""
    algorithm, optimizer, module, splits, task = pieces
    if algorithm and module:
        errors.collect(lambda: check_shared_params(algorithm, module, config.algorithm))
    if optimizer and module:
        errors.collect(lambda: check_lr_multipliers(optimizer, module))
    if splits and task and module:
        errors.collect(lambda: check_model_fits_data(module, task, splits, config.model))


def _setting(
    config: Config,
    topology: Topology,
    optimizer: OptimizerFactory,
    clip: GradientClipper,
    sampler: ClientSampler,
    compression: UpdateCompression,
    clients: int,
) -> Setting:
    """Return the choices that the algorithm has to support, before there is a Run."""
    return Setting(
        optimizer=optimizer,
        clip=clip,
        silos=topology.num_silos,
        clients_per_round=sampler.round_size(clients),
        sampling=None if sampler.takes_all else sampler.name,
        drops_stragglers=config.round.stragglers == "drop",
        finetuning_steps=config.eval.personal_steps,
        compression=None if isinstance(compression, Uncompressed) else compression.name,
    )


def build_clients(config: Config, topology: Topology) -> tuple[DataSplits, Clients]:
    """Load the data set, and partition it into clients. A collective if there are several ranks."""
    return _partitioned(config, _data(config, topology), topology)


def build_loggers(config: Config, folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """Make the loggers of the configuration.

    Args:
        config: the configuration.
        folder: the run folder.
        settings: the values of the configuration by their dotted keys, for loggers that show them.
    """
    return list(instantiate_all("loggers", config.loggers, folder=folder, settings=settings).values())


def _data(config: Config, topology: Topology) -> DataSplits:
    files, component = config.data["files"], config.data
    if files is None:
        return _splits(component)
    if component.get("path") is not None:
        raise ValueError(f"data.path={component['path']} and data.files={format_value(files)}\n  set one of them")
    return load_silo_files(files, lambda file: _splits(component | {"path": file}), topology)


def _splits(component: ComponentConfig) -> DataSplits:
    splits = instantiate("data", component)
    if not isinstance(splits, DataSplits):
        raise ValueError(f"data={component['_target_']} gave a {class_name(splits)}.\n  valid: trainer.data.DataSplits")
    check_labels(splits)
    return splits


def _transforms(config: Config, splits: DataSplits) -> Compose:
    chain = Compose(instantiate_all("transforms", config.transforms), splits.classes, config.channels_last)
    if errors := chain.errors(*splits.train.fetch(torch.arange(1))):
        raise ValueError("\n".join(errors))
    return chain


def _task(config: Config) -> Task:
    task = instantiate("task", config.task)
    if missing := [method for method in REQUIRED_METHODS if not hasattr(task, method)]:
        raise ValueError(
            f"task={config.task['_target_']} gave a {class_name(task)} without {', '.join(missing)}.\n"
            "  valid: an object with the attributes of trainer.tasks.Task"
        )
    return task


def _partitioned(config: Config, splits: DataSplits, topology: Topology) -> tuple[DataSplits, Clients]:
    """Partition the data set; return it with the shifts of its clients, and the clients."""
    clients = _clients(config, splits, topology)
    return shift_clients(splits, clients, instantiate_all("client_shift", config.client_shift), config.seed), clients


def _clients(config: Config, splits: DataSplits, topology: Topology) -> Clients:
    partition = instantiate("partition", config.partition)
    wanted = None if config.clients == "auto" else int(config.clients)
    if splits.homes is not None:
        count, deal = len(splits.homes), partial(per_client_partition, splits, partition, wanted)
    else:
        is_natural = getattr(partition, "is_natural", False)
        count = wanted or (count_natural_clients(splits.train) if is_natural else topology.num_silos)
        deal = partial(partition.split, splits.train, splits.test, count, config.seed)
    if count < topology.num_silos:
        raise ValueError(
            f"clients={count} are fewer than the {topology.num_silos} silos.\n"
            f"  valid: {topology.num_silos} or more; or fewer silos"
        )
    clients: Clients = annotate_errors("partition", config.partition, deal)
    return clients.split_validation(config.data["validation"], config.seed)


def _algorithm(config: Config) -> Algorithm:
    make = annotate_errors("algorithm", config.algorithm, lambda: import_target(config.algorithm))
    if "server" not in signature(make).parameters:
        return instantiate("algorithm", config.algorithm)
    if config.server["_target_"].endswith(".Muon"):
        raise ValueError(
            f"server={config.server['_target_']}: the server moves one long vector, and Muon needs matrices.\n"
            "  set server=average, momentum, nesterov or adam"
        )
    server = _optimizer("server", config.server)
    return instantiate(
        "algorithm", config.algorithm, ("server",), server=_try_optimizer("server", config.server, server)
    )


def _inner_optimizer(component: ComponentConfig, device: torch.device) -> GroupedOptimizerFactory:
    multipliers = tuple((name, float(factor)) for name, factor in component.get("lr_multipliers", []))
    step = _optimizer("optimizer", component)
    if not {"fused", "foreach"} & component.keys() and has_fused_step(import_target(component), device):
        step = partial(step, fused=True)
    make = GroupedOptimizerFactory(step, component.get("exclude_norm_bias_decay", False), multipliers)
    _try_optimizer("optimizer", component, make)
    return make


def _optimizer(key: str, component: ComponentConfig) -> OptimizerFactory:
    return instantiate(key, component, ("params",), _partial_=True)


def _try_optimizer(key: str, component: ComponentConfig, make: OptimizerFactory) -> OptimizerFactory:
    # Check its arguments now, on a dummy parameter, and not when training starts.
    annotate_errors(key, component, lambda: make([nn.Parameter(torch.zeros(1))]))
    return make


def _model(config: Config, topology: Topology) -> nn.Module:
    for generator in default_generators(topology.device):
        generator.manual_seed(derive_seed(config.seed, "initial parameters"))
    module = instantiate("model", config.model)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model={config.model['_target_']} gave a {class_name(module)}.\n  valid: a torch.nn.Module")
    errors = ErrorCollector()
    if (path := config.model.get("init")) is not None:
        errors.collect(lambda: load_pretrained(module, Path(path)))
    if (pattern := config.model.get("freeze")) is not None:
        errors.collect(lambda: freeze(module, pattern))
    errors.raise_any()
    return module


def _check_batch_size(config: Config, topology: Topology) -> None:
    largest = max(topology.silo_sizes)
    if config.batch_size != "all" and int(config.batch_size) < largest:
        raise ValueError(
            f"batch_size={config.batch_size} is smaller than the {largest} replicas of a silo: "
            f"it counts the examples of the whole silo.\n  valid: {largest} or more, or all"
        )


def _measures_flops(config: Config, topology: Topology) -> bool:
    choice = config.metrics.measure_flops
    return topology.device.type == "cuda" if choice == "auto" else choice


def _round_length(config: Config) -> RoundLength:
    given = config.round
    epochs = given.epochs if isinstance(given.epochs, int) else (given.epochs[0], given.epochs[1])
    return RoundLength(epochs, given.steps, given.sync_rounds, given.deadline_seconds, given.stragglers)
