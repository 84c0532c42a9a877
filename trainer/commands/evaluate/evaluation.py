"""The evaluation of a model by all ranks: that of training, on a run that is not trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.commands.evaluate.subject import Subject
from trainer.commands.train.torch_settings import configure_torch
from trainer.config.build import build_evaluation
from trainer.config.schema import Config
from trainer.data import Source
from trainer.data.sources.joined import JoinedSource
from trainer.distributed import collectives
from trainer.distributed.peers import Peers
from trainer.distributed.silos import SiloSpec, silo_sizes
from trainer.distributed.topology import Topology, distributed
from trainer.loggers import Metrics
from trainer.loop.evaluate import evaluate
from trainer.loop.run import Run
from trainer.loop.stopping import StopCriteria
from trainer.loop.train_state import TrainState

Ids = tuple[np.ndarray, ...]  # of each client


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model.

    Attributes:
        metrics: by the names that a run gives them.
        examples: the number of examples of each set that was evaluated.
        clients: the number of test examples of each client.
        ranks: those that evaluated it, for people.
    """

    metrics: Metrics
    examples: dict[str, int]
    clients: list[int]
    ranks: str


def evaluate_subject(subject: Subject, config: Config, peers: Peers, takes_all: bool, silos: SiloSpec) -> Evaluation:
    """Evaluate a model. All ranks must call it.

    Args:
        subject: the model.
        config: its configuration.
        peers: the ranks.
        takes_all: whether the examples of training and of validation are among those of the test.
        silos: that the ranks form.

    Raises:
        ValueError: bad input on any rank. It is raised on all of them.
    """
    launch = config.launch
    threads = configure_torch(config, peers.environment)
    limits = (launch.silo_timeout_seconds, launch.inter_silo_timeout_seconds, launch.inter_silo_backend)
    world = distributed(silos, peers.environment, peers.store, launch.device, *limits, backend=launch.backend)
    with world as topology:
        ranks = f"{topology.world_size} on {topology.device.type}, threads each: {threads}"
        return replace(evaluate_in(topology, subject, config, takes_all), ranks=ranks)


def evaluate_in(topology: Topology, subject: Subject, config: Config, takes_all: bool = False) -> Evaluation:
    """Evaluate a model on the ranks of a topology; see `evaluate_subject`."""
    run = collectives.on_all_ranks(lambda: build_evaluation(config, topology, subject.preprocessing()))
    run = with_all_examples(run) if takes_all else run
    module = run.make_model()
    collectives.on_all_ranks(lambda: subject.finish(module))
    state = TrainState(replace(run, model=lambda: module))
    state.progress.rounds = subject.round
    metrics = evaluate(state)
    assert metrics is not None  # nobody asks it to stop
    metrics.pop("seconds/evaluation")
    sizes = {"test": run.clients.test, "validation": run.clients.validation}
    examples = {name: sum(map(len, clients)) for name, clients in sizes.items()}
    return Evaluation(metrics, examples, [len(ids) for ids in run.clients.test], "")


def with_all_examples(run: Run) -> Run:
    """Return the run with all examples of each client as its test examples, and with none for validation."""
    data, clients = run.data, run.clients
    source, ids = _joined(data.train, clients.train, data.test, clients.test)
    if data.has_validation:
        source, ids = _joined(source, ids, data.validation, clients.validation)
    else:
        ids = tuple(map(np.concatenate, zip(ids, clients.validation, strict=True)))
    parts = data.parts | {"test": source}
    none = (np.empty(0, np.int64),) * len(ids)
    clients = replace(clients, test=ids, validation=none)
    # Training may have gone by the validation examples.
    return replace(run, data=data.with_parts(**parts), clients=clients, monitor=None, stop=StopCriteria())


def _joined(first: Source, ids: Ids, second: Source, others: Ids) -> tuple[Source, Ids]:
    """Return the examples of two sources as one source, and the ids of each client in it."""
    both = zip(ids, others, strict=True)
    return JoinedSource(first, second), tuple(np.concatenate((own, len(first) + more)) for own, more in both)


def fitting_silos(config: Config, peers: Peers) -> SiloSpec:
    """Return the silos of a configuration if the ranks can form them, else one.

    In the run's own silos each sum has the order that it had in training, and with it its last bit.
    """
    nodes = peers.all_gather("nodes", lambda: peers.environment.node)
    try:
        silo_sizes(config.silos, nodes)
    except ValueError:
        return 1
    return config.silos
