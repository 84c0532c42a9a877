"""Tables of silos as ranks read them, in a module that takes no time to import there."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data import PerClientSource, Source, TableEncoder, parquet
from trainer.data.loading.silo_files import load_silo_files
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed


def inputs_of(source: Source) -> np.ndarray:
    return source.fetch(torch.arange(len(source)))[0].numpy()


def read_silos(
    files: list[str], test: str, silos: SiloSpec, columns: dict[str, list[str]]
) -> tuple[TableEncoder, dict[int, np.ndarray]]:
    """Return the encoder that this rank has agreed on, and the matrices of the clients of its silo."""
    with distributed(silos, device="cpu") as topology:
        splits = load_silo_files(files, lambda file: parquet(file, columns=columns, test_path=test), topology)
        assert splits.encoder is not None and isinstance(splits.train, PerClientSource)
        return splits.encoder, {client: inputs_of(source) for client, source in splits.train.local.items()}
