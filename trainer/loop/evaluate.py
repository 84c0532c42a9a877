"""Exact evaluation on any number of ranks: disjoint shards, no padding, sums and counts reduced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.round import Round
from trainer.data import BYTES, Source
from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.loggers import FinalArtifacts
from trainer.loop.control import Action
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.personalization import average_personal_parameters
from trainer.loop.run import Run
from trainer.models.flat import FlatModel
from trainer.optim.ema import ExponentialMovingAverage
from trainer.tasks import Classification
from trainer.utils.oom import raise_if_oom
from trainer.utils.seeding import generator

SAMPLE_LENGTH = 256  # tokens of text that a language model writes at the end


# Puts one model after the other in place, and yields the clients of this silo that are to be judged by it.
ModelIterator = Callable[[LocalTrainer], Iterator[list[int]]]


def client_models(trainer: LocalTrainer) -> Iterator[list[int]]:
    """The clients of this silo, all by one model; or one by one, each with its personal tensors in the model."""
    mine = trainer.run.homes[trainer.run.topology.silo]
    if not trainer.model.has_personal:
        yield mine
        return
    for client in mine:
        trainer.load_personal(client)
        yield [client]


def averaged_personal_model(trainer: LocalTrainer) -> Iterator[list[int]]:
    """The clients of this silo, all by the model that a new client would get: the average of the personal tensors."""
    trainer.model.load_personal_state(average_personal_parameters(trainer))
    yield trainer.run.homes[trainer.run.topology.silo]


def ema_models(ema: ExponentialMovingAverage, trainer: LocalTrainer) -> Iterator[list[int]]:
    """As `client_models`, with the average of the global weights in their place; then the model is as before."""
    with ema.swapped_in():
        yield from client_models(trainer)


def finetuned_models(round: Round, trainer: LocalTrainer) -> Iterator[list[int]]:
    """The clients of this silo, each by its model after a few steps of its own; then the model is as before."""
    session = trainer.algorithm.start_round(round)
    for client in trainer.run.homes[trainer.run.topology.silo]:
        trainer.finetune(session, client, round)
        yield [client]
    trainer.load_global_model()


def evaluation_sums(
    trainer: LocalTrainer, source: Source, ids: tuple[np.ndarray, ...], models: ModelIterator = client_models
) -> dict[str, Tensor]:
    """This rank's part of float64 sums, as `evaluation_metrics` takes them: of every client, and of all together.

    `ids` are the examples of each client. A silo evaluates the clients whose home it is, its replicas sharing each
    client's examples; the sum over the world is exact. Judges nothing any more when this rank is told to leave.
    """
    trainer.model.module.eval()
    # A rank without examples learns from one of another's what is summed.
    rows, pooled = _evaluate_batch(trainer, source, torch.zeros(1, dtype=torch.int64))
    sums = {"clients": rows.new_zeros(len(ids), rows.shape[1])}
    sums |= {name: torch.zeros_like(part, dtype=torch.float64) for name, part in pooled.items()}
    for group in models(trainer):
        trainer.model.module.eval()
        for clients, examples in _batches(trainer.run, ids, group):
            if trainer.control.requested_action() is Action.STOP:
                break
            rows, pooled = _evaluate_batch(trainer, source, examples)
            sums["clients"].index_add_(0, clients, rows)
            for name, part in pooled.items():
                sums[name] += part
    return sums


@torch.no_grad()
def _evaluate_batch(trainer: LocalTrainer, source: Source, examples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The units and score sums of each example, float64, and the pooled sums of all of them; on the CPU."""
    task = trainer.run.task
    inputs, targets = trainer.run.transforms.for_evaluation(source.fetch(examples), trainer.run.topology.device)
    try:
        outputs = trainer.forward(inputs)
    except (RuntimeError, MemoryError) as error:
        raise_if_oom(error, "eval.batch_size", trainer.run.evaluation_batch_size, len(inputs))
        raise
    rows = task.score_sums(outputs, targets).cpu()
    units = rows.new_full((len(examples), 1), task.units(targets))
    return torch.cat((units, rows), 1), {name: part.cpu() for name, part in task.pooled_sums(outputs, targets).items()}


def _batches(run: Run, ids: tuple[np.ndarray, ...], clients: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This replica's examples of these clients, with the client of each, some at a time."""
    topology = run.topology
    mine = [torch.from_numpy(ids[client][topology.replica :: topology.num_replicas]) for client in clients]
    if not mine:
        return
    owners = torch.repeat_interleave(torch.tensor(clients), torch.tensor([len(part) for part in mine]))
    size = run.evaluation_batch_size
    yield from zip(owners.split(size), torch.cat(mine).split(size), strict=True)


def make_artifacts(trainer: LocalTrainer) -> FinalArtifacts:
    """What the finished model shows besides numbers: a confusion matrix, or text if tokens are bytes. A collective."""
    run = trainer.run
    if isinstance(run.task, Classification) and run.data.classes:
        _, summed = collectives.all_reduce_scalars({}, {"confusion": _confusion(trainer, run.data.classes)})
        return FinalArtifacts(confusion=summed["confusion"].long(), label_names=run.data.label_names)
    generate = getattr(run.module, "generate", None)
    if run.topology.rank == 0 and generate and (run.data.classes or 0) <= BYTES:
        return FinalArtifacts(sample=generate(SAMPLE_LENGTH, generator(run.seed, "sample")))
    return FinalArtifacts()


@torch.no_grad()
def _confusion(trainer: LocalTrainer, classes: int) -> Tensor:
    """This rank's part of the test set's confusion matrix: float64 [classes, classes], rows are the truth."""
    run, matrix = trainer.run, torch.zeros(classes * classes, dtype=torch.float64)
    trainer.model.module.eval()
    for group in client_models(trainer):
        for _, examples in _batches(run, run.clients.test, group):
            inputs, targets = run.transforms.for_evaluation(run.data.test.fetch(examples), run.topology.device)
            predicted = trainer.forward(inputs).argmax(1)
            matrix += torch.bincount((targets * classes + predicted).cpu(), minlength=classes * classes)
    return matrix.view(classes, classes)


def model_fingerprint(model: FlatModel) -> int:
    """A 64-bit hash of the trainable parameters' bits: equal models have equal ones."""
    return _hash(torch.cat([model.shared, model.personal])) if len(model.personal) else _hash(model.shared)


def check_consistency(topology: Topology, local: int, model: FlatModel) -> None:
    """Raises RuntimeError, on every rank alike, when equals are not equal bit for bit. A collective.

    `local` is the fingerprint of this rank's model at the end of its local work: equal inside a silo. The shared
    parameters, after the combination, are equal everywhere.
    """
    rows = collectives.all_gather_rows(torch.tensor([topology.silo, local, _hash(model.shared)])).tolist()
    leaders = {silo: local for silo, local, _ in reversed(rows)}
    apart = [rank for rank, (silo, local, _) in enumerate(rows) if local != leaders[silo]]
    if apart:
        raise RuntimeError(f"Replicas have drifted apart: ranks {apart} differ from the first rank of their silo.")
    apart = [rank for rank, row in enumerate(rows) if row[2] != rows[0][2]]
    if apart:
        raise RuntimeError(f"The global model has drifted apart: ranks {apart} differ from rank 0.")


def _hash(vector: Tensor) -> int:
    digest = blake2b(vector.cpu().view(torch.uint8).numpy().data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
