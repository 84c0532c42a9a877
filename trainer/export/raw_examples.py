"""Examples of a run's data as its exported graph takes them: before the transforms, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data import Source
from trainer.export.quantise import Inputs
from trainer.loop.run import Run
from trainer.utils.seeding import generator
from trainer.utils.tensor_trees import Tree, tensors

CALIBRATION_EXAMPLES = 512
CALIBRATION_BATCH = 64


def calibration_batches(run: Run, names: Sequence[str]) -> list[Inputs]:
    """Return batches of training examples, drawn by the seed of the run.

    Args:
        run: whose data they are.
        names: of the graph's inputs.
    """
    ids = torch.from_numpy(np.concatenate(run.clients.train))
    drawn = ids[torch.randperm(len(ids), generator=generator(run.seed, "calibration"))[:CALIBRATION_EXAMPLES]]
    return [_named(run.data.train.fetch(some)[0], names) for some in drawn.split(CALIBRATION_BATCH)]


def evaluation_part(run: Run) -> str:
    """Return the name of the set on which models are compared: validation, or test if there is none."""
    return "validation" if any(map(len, run.clients.validation)) else "test"


def evaluation_batches(run: Run, part: str, names: Sequence[str]) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield batches of the examples of a set, with the targets that the task takes."""
    sources: dict[str, Source] = {"validation": run.data.validation, "test": run.data.test}
    ids = torch.from_numpy(np.concatenate(getattr(run.clients, part)))
    for some in ids.split(run.eval.batch_size):
        examples = sources[part].fetch(some)
        _, targets = run.transforms.for_evaluation(examples, torch.device("cpu"))
        yield _named(examples[0], names), targets


def _named(inputs: Tree, names: Sequence[str]) -> Inputs:
    return {name: tensor.numpy() for name, tensor in zip(names, tensors(inputs), strict=True)}
