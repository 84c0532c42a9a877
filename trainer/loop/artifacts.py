"""Artifacts of the finished model: a confusion matrix, or a sample of text."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data import BYTES
from trainer.loggers import FinalArtifacts
from trainer.loop.evaluate import client_models, evaluation_batches
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.train_state import TrainState
from trainer.utils.seeding import generator

SAMPLE_LENGTH = 256  # tokens of text that a language model writes


def make_artifacts(state: TrainState) -> FinalArtifacts:
    """Make what the finished model shows besides numbers. A collective.

    A classifier shows the confusion matrix of the test set, a language model of bytes a sample of text.
    """
    run = state.run
    if run.task.has_confusion and run.data.classes:
        _, summed = state.exchange.sum({}, {"confusion": _confusion(state.trainer, run.data.classes)})
        return FinalArtifacts(confusion=summed["confusion"].long(), label_names=run.data.label_names)
    generate = getattr(state.model.module, "generate", None)
    if run.topology.rank == 0 and generate and (run.data.classes or 0) <= BYTES:
        return FinalArtifacts(sample=generate(SAMPLE_LENGTH, generator(run.seed, "sample")))
    return FinalArtifacts()


@torch.no_grad()
def _confusion(trainer: LocalTrainer, classes: int) -> Tensor:
    """Return this rank's part of the test set's confusion matrix: float64 [classes, classes], rows are the truth."""
    run, matrix = trainer.run, torch.zeros(classes * classes, dtype=torch.float64)
    trainer.model.module.eval()
    for group in client_models(trainer):
        for _, examples in evaluation_batches(run, run.clients.test, group):
            inputs, targets = trainer.transforms.for_evaluation(run.data.test.fetch(examples), run.topology.device)
            predicted = trainer.step.forward(inputs).argmax(1)
            matrix += torch.bincount((targets * classes + predicted).cpu(), minlength=classes * classes)
    return matrix.view(classes, classes)
