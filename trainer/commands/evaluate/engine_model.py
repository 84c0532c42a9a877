"""An exported version as a module."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.service.engine import load_engine
from trainer.service.version import read_version

OUTPUTS = "outputs"  # of models that return one tensor


class EngineModel(nn.Module):
    """A model that the engine of its exported version computes.

    It has a parameter on which nothing depends: the evaluation of a run wants one.

    Args:
        path: the folder of the version.
    """

    def __init__(self, path: str):
        super().__init__()
        folder = Path(path)
        description = read_version(folder)
        self.names = [spec.name for spec in description.inputs]
        try:
            self.engine = load_engine(folder, description, torch.get_num_threads())
        except ImportError as error:
            raise ValueError(f"the engine needs the package {error.name}\n  pip install silotrain[serve]") from error
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor | dict[str, Tensor]:
        given = dict(zip(self.names, tensors, strict=False)) | named
        found = self.engine.run({name: tensor.cpu().numpy() for name, tensor in given.items()})
        outputs = {name: torch.from_numpy(output).to(self.unused.device) for name, output in found.items()}
        return outputs.get(OUTPUTS, outputs)
