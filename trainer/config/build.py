"""Build the objects of a run from its configuration. The packages below know no configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from trainer.algorithms import Algorithm
from trainer.config.adapter import adapt
from trainer.config.compatibility import (
    check_labels,
    check_lr_multipliers,
    check_model_fits_data,
    check_shared_params,
    check_validation,
)
from trainer.config.instantiate import (
    annotate_errors,
    class_name,
    import_target,
    instantiate,
    instantiate_all,
)
from trainer.config.preprocessing import Preprocessing
from trainer.config.saved_transforms import make_transforms
from trainer.config.schema import ComponentConfig, Config, typed_overrides
from trainer.config.teacher import Teacher, check_teacher_fits, load_teacher
from trainer.data import Clients, DataSplits, Iid, Padding, count_natural_clients, per_client_partition, split_clients
from trainer.data.loading.class_weights import apply_class_weights
from trainer.data.loading.readers import LoadingOptions
from trainer.data.loading.silo_files import load_silo_files
from trainer.data.partition.first_rank import split_on_first_rank
from trainer.data.sources.selected import select_examples
from trainer.data.sources.torch_datasets import DatasetSource
from trainer.data.transforms import Compose, ComposeForTeacher, shift_clients
from trainer.distributed import collectives
from trainer.distributed.sharding import initial_device, is_without_values
from trainer.distributed.topology import Topology
from trainer.loggers import Logger
from trainer.loop.dry_pass import dry_pass
from trainer.loop.options import TrainingOptions
from trainer.loop.run import GradientReducerFactory, Run
from trainer.models.outputs import SelectOutput
from trainer.models.pretrained import freeze, load_pretrained
from trainer.models.pruning import prune
from trainer.optim import GroupedOptimizerFactory
from trainer.optim.optimizers import OptimizerFactory, has_fused_step, has_modes
from trainer.optim.validation import VECTOR, validate_optimizer
from trainer.tasks import REQUIRED_METHODS, Task
from trainer.utils.errors import ErrorCollector, raise_errors
from trainer.utils.seeding import seed_default_generators
from trainer.utils.targets import declares
from trainer.utils.text import format_value

# Components that a Run takes as they are instantiated.
COMPONENTS = ("schedule", "client_sampling", "update_compression")
# conf/server/average.yaml: the server of algorithms that have none to choose.
MEAN = {"_target_": "torch.optim.SGD", "lr": 1.0, "fused": True}
HELD_OUT = 0.1  # of each client's training examples for validation, if the data brings none
TRAINING = [option.name for option in fields(TrainingOptions)]
LOADING = [option.name for option in fields(LoadingOptions)]


def build(config: Config, topology: Topology, splits: DataSplits | None = None) -> Run:
    """Build the Run of this rank, and try a step of its training.

    Args:
        config: the configuration.
        topology: the ranks.
        splits: the data, if it has been read already; None: it is read.

    Raises:
        ValueError: lists every error in the configuration.
    """
    run, model = _assemble(config, topology, lambda: load_teacher(config, topology.device), splits=splits)
    if topology.num_parts == 1:  # a rank need not have the memory for a step of the whole model
        dry_pass(run, model.copy)
    return run


def build_evaluation(config: Config, topology: Topology, preprocessing: Preprocessing | None) -> Run:
    """Build a Run of this rank that is not to be trained.

    Args:
        config: the configuration.
        topology: the ranks.
        preprocessing: of the run that has trained the model, by which the examples are prepared; None: it is measured.

    Raises:
        ValueError: lists every error in the configuration.
    """
    return _assemble(config, topology, _no_teacher, preprocessing)[0]


def _no_teacher() -> None:
    """Return None: evaluation needs no teacher, whose folder need not be there any longer."""


def _assemble(
    config: Config,
    topology: Topology,
    find_teacher: Callable[[], Teacher | None],
    preprocessing: Preprocessing | None = None,
    splits: DataSplits | None = None,
) -> tuple[Run, InitialModel]:
    """Make the Run of this rank; return it with its model. Raise ValueError with every error in the configuration."""
    errors = ErrorCollector()
    splits = splits or errors.collect(lambda: load_data(config, topology, preprocessing))
    teacher = errors.collect(find_teacher)
    task = errors.collect(lambda: _task(config, splits, teacher))
    algorithm = errors.collect(lambda: _algorithm(config))
    slots = {slot: errors.collect(partial(instantiate, slot, getattr(config, slot))) for slot in COMPONENTS}
    slots["gradient_compression"] = errors.collect(lambda: _gradient_reducer(config))
    optimizer = errors.collect(lambda: _inner_optimizer(config.optimizer, topology.device))
    model = errors.collect(lambda: InitialModel(config, topology.device, initial_device(topology)))
    transforms = splits and errors.collect(lambda: _transforms(config, splits, preprocessing))
    partitioned = splits and errors.collect(lambda: _partitioned(config, splits, topology))
    weights = task and partitioned and errors.collect(lambda: apply_class_weights(task, *partitioned))
    errors.collect(lambda: _check_batch_size(config, topology))
    run = None
    if algorithm and optimizer and partitioned and task and all(slots.values()):
        # Even with pieces missing: it is made for its errors then, which are raised with all the others.
        run = errors.collect(
            lambda: Run(
                topology=topology,
                model=model,
                task=task,
                data=partitioned[0],
                clients=partitioned[1],
                algorithm=algorithm,
                optimizer=optimizer,
                rounds=config.rounds,
                seed=config.seed,
                training=TrainingOptions(**{name: getattr(config, name) for name in TRAINING}),
                round=config.round,
                stop=config.stop,
                eval=config.eval,
                sample=config.sample,
                checkpoint=config.checkpoint,
                metrics=config.metrics,
                monitor=config.monitor,
                weights=weights,
                transforms=transforms or Compose(),
                autocast=getattr(torch, config.precision.autocast) if config.precision.autocast else None,
                cache_on_gpu=config.data["cache_on_gpu"],
                loading=LoadingOptions(**{name: config.data[name] for name in LOADING if name in config.data}),
                silo=config.silo,
                **slots,
            )
        )
    _check_together(errors, config, run, algorithm, optimizer, model and model.module, splits, task)
    if teacher and model and splits and not is_without_values(model.module):
        errors.collect(lambda: check_teacher_fits(teacher, model.module, splits, topology.device))
    errors.raise_any()
    assert run and model
    return run, model


def _check_together(errors: ErrorCollector, config: Config, run: Run | None, *pieces: Any) -> None:
    """Collect the errors of components that do not fit each other; those that could not be made are None."""
    algorithm, optimizer, module, splits, task = pieces
    if run and module:
        errors.collect(lambda: run.validate_model(module))
    if algorithm and module:
        errors.collect(lambda: check_shared_params(algorithm, module, config.algorithm))
    if optimizer and module:
        errors.collect(lambda: check_lr_multipliers(optimizer, module))
    if splits and task and module and not is_without_values(module):
        errors.collect(lambda: check_model_fits_data(module, task, splits, config.model))
    if run:
        errors.collect(lambda: annotate_errors("client_sampling", config.client_sampling, lambda: run.sample_round(0)))


class InitialModel:
    """Makes the initial model of a configuration.

    The module that was made to be checked is the one that the first call returns, because a large one takes long.
    """

    def __init__(self, config: Config, device: torch.device, place: AbstractContextManager[object] | None = None):
        self.config, self.device = config, device
        seed_default_generators(device, config.seed, "initial parameters")
        with place or nullcontext():
            self.module: nn.Module | None = _model(config)

    def __call__(self) -> nn.Module:
        module, self.module = self.module, None
        return _model(self.config) if module is None else module

    def copy(self) -> nn.Module:
        """Return a copy of the module that the first call returns."""
        try:
            return deepcopy(self.module)  # pyright: ignore[reportReturnType] (it is called before the first call)
        except Exception:  # of modules that cannot be copied, such as those that hold a torch.Generator
            seed_default_generators(self.device, self.config.seed, "initial parameters")
            return _model(self.config)


def build_clients(config: Config, topology: Topology) -> tuple[DataSplits, Clients]:
    """Load the data set, and partition it into clients. A collective if there are several ranks."""
    return _partitioned(config, load_data(config, topology), topology)


def build_loggers(config: Config, folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """Make the loggers of the configuration.

    Args:
        config: the configuration.
        folder: the run folder.
        settings: the values of the configuration by their dotted keys, for loggers that show them.
    """
    return list(instantiate_all("loggers", config.loggers, folder=folder, settings=settings).values())


def load_data(config: Config, topology: Topology, preprocessing: Preprocessing | None = None) -> DataSplits:
    """Load the data set of a configuration. A collective if silos have files of their own."""
    splits = read_data(config, topology, preprocessing)
    raise_errors(splits.encoder.errors if splits.encoder else [])
    return splits


def read_data(config: Config, topology: Topology, preprocessing: Preprocessing | None = None) -> DataSplits:
    """Load the data set of a configuration, of whose columns some may have values at other sites alone."""
    files, component, encoder = config.data["files"], config.data, preprocessing and preprocessing.encoder
    if preprocessing and preprocessing.label_names and component.get("classes", ...) is None:
        component = component | {"classes": list(preprocessing.label_names)}

    def read(component: ComponentConfig) -> DataSplits:
        splits = _splits(component)
        return splits.encoded_by(encoder) if encoder else splits

    client = _own_client(config)
    part, path = component["validation"], component.get("validation_path")
    if part != "auto" and path is not None:
        raise ValueError(f"data.validation_path={path} and data.validation={part}\n  set one of them")
    if files is not None and component.get("path") is not None:
        raise ValueError(f"data.path={component['path']} and data.files={format_value(files)}\n  set one of them")
    if files is not None and client is not None:
        splits = read(component | {"path": files[client]})
    elif files is not None:
        splits = load_silo_files(files, lambda file: read(component | {"path": file}), topology, encoder)
    elif declares(config.partition["_target_"], "is_computed_once") and topology.silo_group is not None:
        splits = collectives.on_all_ranks(lambda: read(component))  # ranks that failed would miss the partition
    else:
        splits = read(component)
    if files is None and client is not None:
        clients = _dealt(config, splits, topology)
        splits = select_examples(splits, {part: getattr(clients, part)[client] for part in splits.parts})
    if preprocessing:
        preprocessing.check_labels(splits)
    return splits


def _own_client(config: Config) -> int | None:
    """Return the client whose examples this launch has, as a site of a simulation; None if it is none."""
    site = config.site
    return list(site.members).index(site.name) if site.simulate is not None and site.name is not None else None


def _splits(component: ComponentConfig) -> DataSplits:
    splits = instantiate("data", component)
    if not isinstance(splits, DataSplits):
        raise ValueError(f"data={component['_target_']} gave a {class_name(splits)}.\n  valid: trainer.data.DataSplits")
    if component["validation"] != "auto":
        splits = splits.without_validation()
    check_validation(splits)
    if "collate_fn" in component:
        _set_collate_fn(splits, component["collate_fn"])
    check_labels(splits)
    return splits


def _set_collate_fn(splits: DataSplits, name: str) -> None:
    """Have the items of the user's Datasets made a batch by the function of this name."""
    try:
        function = import_target({"_target_": name})
    except ImportError as error:
        raise ValueError(f"data.collate_fn={name}: {' '.join(str(error).split())}") from error
    if function is default_collate:
        return
    sources = [source for source in splits.parts.values() if isinstance(source, DatasetSource)]
    if not callable(function) or not sources:
        reason = "no items to collate: the examples are tensors" if callable(function) else "it cannot be called"
        raise ValueError(f"data.collate_fn={name}: {reason}\n  leave it out, or give a function of a list of items")
    for source in sources:
        source.collate_fn = function


def _transforms(config: Config, splits: DataSplits, preprocessing: Preprocessing | None) -> Compose:
    chain = make_transforms(config.transforms, splits.classes, config.channels_last)
    if preprocessing:
        chain = chain.with_state(preprocessing.transforms)
    padding: Padding | None = getattr(splits.train, "padding", None)
    if errors := chain.errors(*splits.train.fetch(torch.arange(1)), padding.padded_inputs if padding else ()):
        raise ValueError("\n".join(errors))
    return chain if config.task.get("teacher") is None else ComposeForTeacher(**vars(chain))


def _task(config: Config, splits: DataSplits | None, teacher: Teacher | None = None) -> Task:
    task = _instantiate_task(config.task, splits, teacher)
    if missing := [method for method in REQUIRED_METHODS if not hasattr(task, method)]:
        raise ValueError(
            f"task={config.task['_target_']} gave a {class_name(task)} without {', '.join(missing)}.\n"
            "  valid: an object with the attributes of trainer.tasks.Task"
        )
    return task


def _instantiate_task(component: ComponentConfig, splits: DataSplits | None, teacher: Teacher | None) -> Any:
    """Instantiate the task with those of the tokens' bytes and the teacher that it takes."""
    offered = {"token_bytes": splits and splits.token_bytes, "teacher": teacher}
    taken = signature(annotate_errors("task", component, lambda: import_target(component))).parameters.keys()
    if teacher and "teacher" not in taken:
        raise ValueError(
            f"task.teacher={teacher.folder}: task={component['_target_']} learns from none\n  set task=distillation"
        )
    given = {name: value for name, value in offered.items() if name in taken}
    if not given:
        return instantiate("task", component)
    make = instantiate("task", component, tuple(given), _partial_=True)  # Hydra would copy them
    return annotate_errors("task", component, lambda: make(**given))


def _partitioned(config: Config, splits: DataSplits, topology: Topology) -> tuple[DataSplits, Clients]:
    """Partition the data set; return it with the shifts of its clients, and the clients."""
    clients = _clients(config, splits, topology)
    return shift_clients(splits, clients, instantiate_all("client_shift", config.client_shift), config.seed), clients


def _clients(config: Config, splits: DataSplits, topology: Topology) -> Clients:
    clients = _dealt(config, splits, topology)
    part = config.data["validation"]
    if part == "auto":
        return clients if splits.has_validation else clients.split_validation(HELD_OUT, config.seed)
    return clients.split_validation(part, config.seed)


def _dealt(config: Config, splits: DataSplits, topology: Topology) -> Clients:
    """Return the clients as the partition makes them, before validation examples are taken from their training sets."""
    partition = instantiate("partition", config.partition)
    if splits.homes is not None and config.site.simulate is not None:
        partition = Iid()  # the sites have their own examples, which the partition has dealt to them
    wanted = None if config.clients == "auto" else int(config.clients)
    if splits.homes is not None:
        count, deal = len(splits.homes), partial(per_client_partition, splits, partition, wanted)
    else:
        is_natural = getattr(partition, "is_natural", False)
        count = wanted or (count_natural_clients(splits.train) if is_natural else topology.num_silos)
        deal = partial(split_clients, splits, partition, count, config.seed)
        if getattr(partition, "is_computed_once", False):
            deal = partial(split_on_first_rank, deal, splits, count, topology)
    if count < len(set(splits.homes or range(topology.num_silos))):
        raise ValueError(
            f"clients={count} are fewer than the {topology.num_silos} silos.\n"
            f"  valid: {topology.num_silos} or more; or fewer silos"
        )
    return annotate_errors("partition", config.partition, deal)


def _algorithm(config: Config) -> Algorithm:
    make = annotate_errors("algorithm", config.algorithm, lambda: import_target(config.algorithm))
    if "server" not in signature(make).parameters:
        if config.server != MEAN:
            raise ValueError(
                f"server={config.server['_target_']} with algorithm={config.algorithm['_target_']}: it has no server "
                f"optimizer.{typed_overrides('server', config.server)}\n"
                "  leave server= out, or set algorithm=fedavg"
            )
        return instantiate("algorithm", config.algorithm)
    if declares(config.server["_target_"], "needs_matrices"):
        raise ValueError(
            f"server={config.server['_target_']}: the server moves one long vector, and it needs matrices.\n"
            "  set server=average, momentum, nesterov or adam"
        )
    server = _optimizer("server", config.server)
    annotate_errors("server", config.server, lambda: _validate_server(server))
    return instantiate("algorithm", config.algorithm, ("server",), server=server)


def _validate_server(server: OptimizerFactory) -> None:
    validate_optimizer(server, VECTOR)
    if has_modes(server([torch.nn.Parameter(torch.zeros(1))])):
        raise ValueError("it has weights to train and others to evaluate, and a server has one model for both")


def _inner_optimizer(component: ComponentConfig, device: torch.device) -> GroupedOptimizerFactory:
    multipliers = tuple((name, float(factor)) for name, factor in component.get("lr_multipliers", []))
    step = _optimizer("optimizer", component)
    if not {"fused", "foreach"} & component.keys() and has_fused_step(import_target(component), device):
        step = partial(step, fused=True)
    make = GroupedOptimizerFactory(step, component.get("exclude_norm_bias_decay", False), multipliers)
    annotate_errors("optimizer", component, lambda: validate_optimizer(make))  # its errors now, and not in training
    return make


def _optimizer(key: str, component: ComponentConfig) -> OptimizerFactory:
    return instantiate(key, component, ("params",), _partial_=True)


def _gradient_reducer(config: Config) -> GradientReducerFactory:
    component = config.gradient_compression
    make = instantiate("gradient_compression", component, _partial_=True)
    annotate_errors("gradient_compression", component, make)  # its errors now, and not when training starts
    return make


def _model(config: Config) -> nn.Module:
    module = instantiate("model", config.model)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model={config.model['_target_']} gave a {class_name(module)}.\n  valid: a torch.nn.Module")
    if (output := config.task["output"]) is not None:
        module.register_forward_hook(SelectOutput(output))
    errors = ErrorCollector()
    path = config.model.get("init")
    if path is not None and not is_without_values(module):
        errors.collect(lambda: load_pretrained(module, Path(path).expanduser()))
    errors.collect(lambda: adapt(module, config.adapter))
    if (pattern := config.model.get("freeze")) is not None:
        errors.collect(lambda: freeze(module, pattern))
    errors.collect(lambda: _check_prune(config))
    errors.raise_any()
    if (sparsity := config.model.get("prune")) is not None:
        prune(module, sparsity)
    return module


def _check_prune(config: Config) -> None:
    sparsity = config.model.get("prune")
    if sparsity is not None and config.model.get("init") is None:
        raise ValueError(
            f"model.prune={sparsity} without model.init: the smallest of random weights are as good as the others.\n"
            "  set model.init to the weights of a trained model, such as outputs/mine/model.safetensors"
        )
    if sparsity is not None and instantiate("adapter", config.adapter) is not None:
        raise ValueError(
            f"model.prune={sparsity} with adapter={config.adapter['_target_']}: what an adapter adds to the weights "
            "has no zeros.\n  set adapter=none; or prune the merged model of the finished run"
        )


def _check_batch_size(config: Config, topology: Topology) -> None:
    largest = max(topology.silo_sizes)
    if config.batch_size != "all" and int(config.batch_size) < largest:
        raise ValueError(
            f"batch_size={config.batch_size} is smaller than the {largest} replicas of a silo: "
            f"it counts the examples of the whole silo.\n  valid: {largest} or more, or all"
        )
