"""Exact evaluation on any number of ranks: disjoint shards, no padding, sums and counts reduced."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from trainer import comm
from trainer.contact import Wish
from trainer.data import Source
from trainer.flat import FlatModel
from trainer.local import LocalTrainer
from trainer.metrics import Exhibits
from trainer.randomness import generator
from trainer.run import Run
from trainer.tasks import Classification
from trainer.topology import Topology

SAMPLE_LENGTH = 256  # tokens of text that a language model writes at the end


@torch.no_grad()
def client_sums(trainer: LocalTrainer, source: Source, ids: tuple[np.ndarray, ...]) -> Tensor:
    """This rank's part of every client's sums: float64 [clients, 1 + loss and scores], the units first.

    `ids` are the examples of each client. A silo evaluates the clients whose home it is, its replicas sharing each
    client's examples; the sum over the world is exact. With personal tensors each client is judged by its own model.
    Ends early when this rank is told to leave.
    """
    run, model = trainer.run, trainer.model
    table = torch.zeros(len(ids), 2 + len(run.task.scores), dtype=torch.float64)
    model.module.eval()
    for group in _judged_together(trainer):
        for clients, examples in _batches(run, ids, group):
            if trainer.contact.wish() is Wish.LEAVE:
                return table
            inputs, targets = (tensor.to(run.topology.device) for tensor in source.fetch(examples))
            sums = run.task.score_sums(trainer.outputs(inputs), targets).cpu()
            units = sums.new_full((len(examples), 1), run.task.units(targets))
            table.index_add_(0, clients, torch.cat((units, sums), 1))
    return table


def _judged_together(trainer: LocalTrainer) -> Iterator[list[int]]:
    """The clients of this silo, all by one model; or one by one, each with its personal tensors in the model."""
    mine = trainer.run.homes[trainer.run.topology.silo]
    if not trainer.model.has_personal:
        yield mine
        return
    for client in mine:
        trainer.load_personal(client)
        yield [client]


def _batches(run: Run, ids: tuple[np.ndarray, ...], clients: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This replica's examples of these clients, with the client of each, some at a time."""
    topology = run.topology
    mine = [torch.from_numpy(ids[client][topology.replica :: topology.num_replicas]) for client in clients]
    if not mine:
        return
    owners = torch.repeat_interleave(torch.tensor(clients), torch.tensor([len(part) for part in mine]))
    size = run.evaluation_batch_size
    yield from zip(owners.split(size), torch.cat(mine).split(size), strict=True)


def exhibits(trainer: LocalTrainer) -> Exhibits:
    """What the finished model shows besides numbers: a confusion matrix, or a text sample. A collective."""
    run = trainer.run
    if isinstance(run.task, Classification) and run.data.classes:
        _, summed = comm.sum_header({}, {"confusion": _confusion(trainer, run.data.classes)})
        return Exhibits(confusion=summed["confusion"].long(), label_names=run.data.label_names)
    generate = getattr(run.module, "generate", None)
    if run.topology.rank == 0 and generate:
        return Exhibits(sample=generate(SAMPLE_LENGTH, generator(run.seed, "sample")))
    return Exhibits()


@torch.no_grad()
def _confusion(trainer: LocalTrainer, classes: int) -> Tensor:
    """This rank's part of the test set's confusion matrix: float64 [classes, classes], rows are the truth."""
    run, matrix = trainer.run, torch.zeros(classes * classes, dtype=torch.float64)
    trainer.model.module.eval()
    for group in _judged_together(trainer):
        for _, examples in _batches(run, run.clients.test, group):
            inputs, targets = (tensor.to(run.topology.device) for tensor in run.data.test.fetch(examples))
            predicted = trainer.outputs(inputs).argmax(1)
            matrix += torch.bincount((targets * classes + predicted).cpu(), minlength=classes * classes)
    return matrix.view(classes, classes)


def fingerprint(model: FlatModel) -> int:
    """A 64-bit hash of the trainable parameters' bits: equal models have equal ones."""
    return _hash(torch.cat([model.shared, model.personal])) if len(model.personal) else _hash(model.shared)


def check_agreement(topology: Topology, local: int, model: FlatModel) -> None:
    """Raises RuntimeError, on every rank alike, when equals are not equal bit for bit. A collective.

    `local` is the fingerprint of this rank's model at the end of its local work: equal inside a silo. The shared
    parameters, after the combination, are equal everywhere.
    """
    rows = comm.gather_rows(torch.tensor([topology.silo, local, _hash(model.shared)])).tolist()
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
