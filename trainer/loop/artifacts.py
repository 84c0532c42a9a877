"""Artifacts of the finished model: a confusion matrix, or a sample of text."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from trainer.data import BYTES
from trainer.loggers import FinalArtifacts
from trainer.loop.evaluate import client_models, evaluated_batches
from trainer.loop.local_trainer import LocalTrainer
from trainer.loop.run import Run
from trainer.loop.text_samples import continue_text, writes_samples
from trainer.loop.train_state import TrainState

SAMPLE_PROMPT, SAMPLE_LENGTH = "\n", 256  # of the text that a language model writes, without prompts of the user's


def make_artifacts(state: TrainState) -> FinalArtifacts:
    """Make what the finished model shows besides numbers. A collective.

    A classifier shows the confusion matrix of the test set, a language model of bytes a sample of text. Larger
    vocabularies have larger models, whose samples take long: they write those that are asked for.
    """
    run = state.run
    if run.task.has_confusion and run.data.classes:
        _, summed = state.exchange.sum("end/artifacts", {}, {"confusion": _confusion(state.trainer, run.data.classes)})
        return FinalArtifacts(confusion=summed["confusion"].long(), label_names=run.data.label_names)
    is_small = (run.data.classes or 0) <= BYTES
    if writes_samples(state) and run.can_sample and is_small and not run.sample.prompts:
        sample = _sample(run, state.model.module)
        return FinalArtifacts(sample=sample) if run.topology.rank == 0 else FinalArtifacts()
    return FinalArtifacts()


def _sample(run: Run, module: nn.Module) -> str:
    """Return a text of the model; empty if it cannot write one, since nobody has asked for it."""
    try:
        return continue_text(run, module, SAMPLE_PROMPT, SAMPLE_LENGTH, temperature=1.0)
    except Exception as error:  # of a model that takes whole windows alone
        logging.getLogger(__name__).info("no sample of text: %s", error)
        return ""


@torch.no_grad()
def _confusion(trainer: LocalTrainer, classes: int) -> Tensor:
    """Return this rank's part of the test set's confusion matrix: float64 [classes, classes], rows are the truth."""
    run, matrix = trainer.run, torch.zeros(classes * classes, dtype=torch.float64)
    trainer.model.module.eval()
    for group in client_models(trainer):
        for _, outputs, targets in evaluated_batches(trainer, run.data.test, run.clients.test, group):
            predicted = outputs.argmax(1)
            matrix += torch.bincount((targets * classes + predicted).cpu(), minlength=classes * classes)
    return matrix.view(classes, classes)
