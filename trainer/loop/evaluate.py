"""Exact evaluation on any number of ranks: disjoint shards, no padding, sums and counts reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.round import Round
from trainer.data import Source
from trainer.data.loading.loader import Examples
from trainer.distributed import collectives
from trainer.loggers import Metrics
from trainer.loop.consistency import check_consistency
from trainer.loop.control import Action
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.monitor import COORDINATOR, client_scores
from trainer.loop.pooled_sums import PooledSums, totals
from trainer.loop.round_metrics import evaluation_metrics
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.buffers import preserved_buffers
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.state import clone
from trainer.tasks import Task
from trainer.tasks.base import example_units
from trainer.utils.oom import raise_if_oom
from trainer.utils.tensor_trees import num_examples, split

EVALUATION_SEED = 0  # of what a source draws at random, as `Source.fetch` has it

# Puts one model after the other in place, and yields the clients of this silo that are to be evaluated with it.
ModelIterator = Callable[[LocalTrainer], Iterator[list[int]]]


def evaluate(state: TrainState) -> Metrics | None:
    """Evaluate the models on the validation and test sets. A collective.

    Returns:
        The metrics; None if a rank was asked to stop on the way.

    Raises:
        RuntimeError: models that must be equal are not.
    """
    run, clients = state.run, state.run.clients
    began = perf_counter()
    state.control.set_activity(f"round {state.progress.rounds + 1}: evaluating")
    if run.eval.personal_steps:
        # Clients begin with what is still under way: it is part of the model that is evaluated, and of the one saved.
        state.algorithm.flush()
    check_consistency(run.topology, state.local_fingerprint, state.model)
    sums_by_set = {"test": evaluation_sums(state.trainer, run.data.test, clients.test)}
    if any(len(ids) for ids in clients.validation):
        sums_by_set["validation"] = evaluation_sums(state.trainer, run.data.validation, clients.validation)
    if state.averages_personal:
        sums_by_set["global"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged_personal_model)
    if state.ema:
        averaged = partial(ema_models, state.ema)
        sums_by_set["ema"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged)
    if run.eval.personal_steps:
        finetuned = partial(finetuned_models, run.sample_round(state.progress.rounds))
        sums_by_set["personal"] = evaluation_sums(state.trainer, run.data.test, clients.test, finetuned)
    if run.data.has_central:
        sums_by_set[COORDINATOR] = evaluation_sums(state.trainer, *_central_examples(run), coordinator_model)
    tables = {f"{part}/{name}": table for part, tables in sums_by_set.items() for name, table in tables.items()}
    is_asked = state.control.requested_action() is Action.STOP
    name = f"rounds/{state.progress.rounds}/evaluation"
    sums, tables = state.exchange.sum(name, {"stopping": float(is_asked)}, tables)
    state.trainer.consensus.flush()  # what it has under way belongs to this round
    state.is_stopping = sums["stopping"] > 0
    if state.is_stopping:
        return None
    metrics: Metrics = {}
    for part, tables_of_set in sums_by_set.items():
        metrics |= evaluation_metrics(run, part, {name: tables[f"{part}/{name}"] for name in tables_of_set})
    return metrics | {"seconds/evaluation": perf_counter() - began}


def client_models(trainer: LocalTrainer) -> Iterator[list[int]]:
    """Yield the clients of this silo: all with one model, or one by one with their personal parameters in it."""
    clients = trainer.run.homes[trainer.run.topology.silo]
    if not trainer.model.has_personal:
        yield clients
        return
    for client in clients:
        trainer.load_personal(client)
        yield [client]


def averaged_personal_model(trainer: LocalTrainer) -> Iterator[list[int]]:
    """Yield the clients of this silo, all with the model of a new client: the mean of the personal parameters."""
    trainer.model.load_personal_state(trainer.average_personal())
    yield trainer.run.homes[trainer.run.topology.silo]


def ema_models(ema: ExponentialMovingAverage, trainer: LocalTrainer) -> Iterator[list[int]]:
    """Yield as `client_models`, with the average of the weights in place of the weights; restore them afterwards."""
    with ema.swapped_in():
        yield from client_models(trainer)


def finetuned_models(round: Round, trainer: LocalTrainer) -> Iterator[list[int]]:
    """Yield the clients of this silo, each with the model after some steps of its own; restore it afterwards."""
    session, local = trainer.algorithm.start_round(round), clone(trainer.local_tensors.state_dict())
    for client in trainer.run.homes[trainer.run.topology.silo]:
        with preserved_buffers(trainer.model.module):
            trainer.finetune(session, client, round)
            yield [client]
        trainer.local_tensors.load_state_dict(local)
    trainer.load_global_model()


def coordinator_model(trainer: LocalTrainer) -> Iterator[list[int]]:
    """Yield the place of the coordinator's examples in `_central_examples`, with the global model."""
    yield [0]


def _central_examples(run: Run) -> tuple[Source, tuple[np.ndarray, ...]]:
    """Return the coordinator's own test set, in the place of the first client; at a site the site's, and no ids."""
    none = [np.empty(0, np.int64) for _ in run.clients.test]
    if run.data.central is None:
        return run.data.test, tuple(none)
    return run.data.central, (np.arange(len(run.data.central)), *none[1:])


def evaluation_sums(
    trainer: LocalTrainer, source: Source, ids: tuple[np.ndarray, ...], models: ModelIterator = client_models
) -> dict[str, Tensor]:
    """This rank's part of float64 sums, as `evaluation_metrics` takes them: of every client, and of all together.

    `ids` are the examples of each client. A silo evaluates the clients whose home it is, its replicas sharing each
    client's examples; the sum over the world is exact. Nothing more is evaluated once this rank is asked to stop.
    """
    run, topology = trainer.run, trainer.run.topology
    trainer.model.module.eval()
    # A rank without examples learns from one of another's what is summed.
    outputs, targets = _forward(trainer, source.fetch(torch.zeros(1, dtype=torch.int64)))
    rows, like = _score_rows(run.task, outputs, targets), _pooled_sums(run.task, outputs, targets)
    table, pooled, of_clients = rows.new_zeros(len(ids), rows.shape[1]), PooledSums(like), ClientSums(run, ids, like)
    for group in models(trainer):
        trainer.model.module.eval()
        for clients, outputs, targets in evaluated_batches(trainer, source, ids, group):
            table.index_add_(0, clients, _score_rows(run.task, outputs, targets))
            pooled.add(_pooled_sums(run.task, outputs, targets))
            of_clients.add(clients, outputs, targets)
    return {
        "clients": table,
        "by_client": of_clients.scores(),
        **pooled.tables(topology.rank, topology.world_size),
    }


class ClientSums:
    """Pooled sums of each client of this silo, for the scores of single clients that are made from them.

    A client is evaluated by the replicas of one silo: its sums are added up there, and only its scores go further.

    Args:
        run: the choices.
        ids: the examples of each client.
        like: the pooled sums of any example.
    """

    def __init__(self, run: Run, ids: tuple[np.ndarray, ...], like: Mapping[str, Tensor]):
        self.run, self.ids = run, ids
        homes = run.homes[run.topology.silo] if client_scores(run)[1:] else []
        self.sums = {client: PooledSums(like) for client in homes if len(ids[client])}

    def add(self, clients: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add the examples of a batch, those of each client one after the other."""
        if not self.sums:
            return
        owners, counts = clients.unique_consecutive(return_counts=True)
        parts = zip(owners.tolist(), split(outputs, counts.tolist()), split(targets, counts.tolist()), strict=True)
        for client, its_outputs, its_targets in parts:
            self.sums[client].add(_pooled_sums(self.run.task, its_outputs, its_targets))

    def scores(self) -> Tensor:
        """Return this rank's part of a float64 table of scores [clients, client_scores]. A collective of the silo."""
        names, topology = self.run.metrics.client_scores, self.run.topology
        table = torch.zeros(len(self.ids), len(names), dtype=torch.float64)
        replica, replicas = topology.replica, topology.num_replicas
        tables = {
            client: sums.tables(replica, replicas, most=-(-len(self.ids[client]) // replicas))
            for client, sums in self.sums.items()
        }
        parts = [part for of_client in tables.values() for part in of_client.values()]
        if parts and topology.silo_size > 1:
            packed = collectives.all_reduce_in_silo(torch.cat([part.flatten() for part in parts]), topology)
            for part, summed in zip(parts, packed.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
        if topology.is_leader:
            for client, of_client in tables.items():
                measured = self.run.task.pooled_summary(totals(of_client))
                table[client] = torch.tensor([measured.get(name, math.nan) for name in names], dtype=torch.float64)
        return table


def _score_rows(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the units and score sums of each example, float64 on the CPU."""
    return torch.cat((example_units(task, targets)[:, None], task.score_sums(outputs, targets).cpu()), 1)


def _pooled_sums(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the pooled sums of all examples, on the CPU."""
    return {name: part.cpu() for name, part in task.pooled_sums(outputs, targets).items()}


@torch.no_grad()
def _forward(trainer: LocalTrainer, examples: Examples) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of these examples."""
    inputs, targets = trainer.transforms.for_evaluation(examples, trainer.run.topology.device)
    try:
        return trainer.step.forward(inputs), targets
    except (RuntimeError, MemoryError) as error:
        raise_if_oom(error, "eval.batch_size", trainer.run.eval.batch_size, num_examples(inputs))
        raise


def evaluated_batches(
    trainer: LocalTrainer, source: Source, ids: tuple[np.ndarray, ...], clients: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the clients, outputs and targets of this replica's examples of some clients, until it is asked to stop.

    Where a forward pass is a collective of the silo, all replicas make as many as the one with most examples, and agree
    on when to stop.
    """
    topology, size = trainer.run.topology, trainer.run.eval.batch_size
    mine = [torch.from_numpy(ids[client][topology.replica :: topology.num_replicas]) for client in clients]
    requested, fillers = trainer.control.requested_action, 0
    if trainer.step.parallel.forwards_together:
        requested = trainer.consensus.poll
        most = sum(-(-len(ids[client]) // topology.num_replicas) for client in clients)
        fillers = -(-most // size) - -(-sum(map(len, mine)) // size)
    counts = torch.tensor([len(part) for part in mine], dtype=torch.int64)
    owners = torch.repeat_interleave(torch.tensor(clients, dtype=torch.int64), counts)
    for some, examples in _evaluation_batches(trainer, source, owners, torch.cat([owners[:0], *mine])):
        if requested() is Action.STOP:
            return
        outputs, targets = _forward(trainer, examples)
        if topology.counts_examples:
            yield some, outputs, targets
    for _ in range(fillers):
        if requested() is Action.STOP:
            return
        _forward(trainer, source.fetch(torch.zeros(1, dtype=torch.int64)))


def _evaluation_batches(
    trainer: LocalTrainer, source: Source, owners: Tensor, ids: Tensor
) -> Iterator[tuple[Tensor, Examples]]:
    """Yield examples with the client of each, some at a time."""
    if not len(ids):
        return  # splitting nothing makes a part without examples
    size = trainer.run.eval.batch_size
    requests = ((some, EVALUATION_SEED) for some in ids.split(size))
    yield from zip(owners.split(size), trainer.reader.read(source, requests, is_split=True), strict=True)
