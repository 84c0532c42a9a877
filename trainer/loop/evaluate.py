"""Exact evaluation on any number of ranks: disjoint shards, no padding, sums and counts reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.round import Round
from trainer.data import Source
from trainer.loggers import Metrics
from trainer.loop.consistency import check_consistency
from trainer.loop.control import Action
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.pooled_sums import PooledSums
from trainer.loop.round_metrics import evaluation_metrics
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models.buffers import preserved_buffers
from trainer.optim.ema import ExponentialMovingAverage
from trainer.optim.state import clone
from trainer.tasks.base import example_units
from trainer.utils.oom import raise_if_oom
from trainer.utils.tensor_trees import num_examples

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
    if state.model.has_personal and state.model.has_shared:
        sums_by_set["global"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged_personal_model)
    if state.ema:
        averaged = partial(ema_models, state.ema)
        sums_by_set["ema"] = evaluation_sums(state.trainer, run.data.test, clients.test, averaged)
    if run.eval.personal_steps:
        finetuned = partial(finetuned_models, run.sample_round(state.progress.rounds))
        sums_by_set["personal"] = evaluation_sums(state.trainer, run.data.test, clients.test, finetuned)
    tables = {f"{part}/{name}": table for part, tables in sums_by_set.items() for name, table in tables.items()}
    is_asked = state.control.requested_action() is Action.STOP
    sums, tables = state.exchange.sum({"stopping": float(is_asked)}, tables)
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


def evaluation_sums(
    trainer: LocalTrainer, source: Source, ids: tuple[np.ndarray, ...], models: ModelIterator = client_models
) -> dict[str, Tensor]:
    """This rank's part of float64 sums, as `evaluation_metrics` takes them: of every client, and of all together.

    `ids` are the examples of each client. A silo evaluates the clients whose home it is, its replicas sharing each
    client's examples; the sum over the world is exact. Nothing more is evaluated once this rank is asked to stop.
    """
    trainer.model.module.eval()
    # A rank without examples learns from one of another's what is summed.
    rows, like = _evaluate_batch(trainer, source, torch.zeros(1, dtype=torch.int64))
    table, pooled = rows.new_zeros(len(ids), rows.shape[1]), PooledSums(like)
    for group in models(trainer):
        trainer.model.module.eval()
        for clients, examples in evaluation_batches(trainer.run, ids, group):
            if trainer.control.requested_action() is Action.STOP:
                break
            rows, parts = _evaluate_batch(trainer, source, examples)
            table.index_add_(0, clients, rows)
            pooled.add(parts)
    topology = trainer.run.topology
    return {"clients": table, **pooled.tables(topology.rank, topology.world_size)}


@torch.no_grad()
def _evaluate_batch(trainer: LocalTrainer, source: Source, examples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The units and score sums of each example, float64, and the pooled sums of all of them; on the CPU."""
    task = trainer.run.task
    inputs, targets = trainer.transforms.for_evaluation(source.fetch(examples), trainer.run.topology.device)
    try:
        outputs = trainer.step.forward(inputs)
    except (RuntimeError, MemoryError) as error:
        raise_if_oom(error, "eval.batch_size", trainer.run.eval.batch_size, num_examples(inputs))
        raise
    rows = task.score_sums(outputs, targets).cpu()
    units = example_units(task, targets)[:, None]
    return torch.cat((units, rows), 1), {name: part.cpu() for name, part in task.pooled_sums(outputs, targets).items()}


def evaluation_batches(run: Run, ids: tuple[np.ndarray, ...], clients: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This replica's examples of these clients, with the client of each, some at a time."""
    topology = run.topology
    mine = [torch.from_numpy(ids[client][topology.replica :: topology.num_replicas]) for client in clients]
    if not any(map(len, mine)):
        return  # splitting nothing makes a part without examples
    owners = torch.repeat_interleave(torch.tensor(clients), torch.tensor([len(part) for part in mine]))
    size = run.eval.batch_size
    yield from zip(owners.split(size), torch.cat(mine).split(size), strict=True)
