"""Small models of the package transformers, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trainer.models import from_transformers

LLAMA = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def make_llama(seed: int = 0) -> nn.Module:
    """Return a llama of 2 layers, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return from_transformers(architecture="llama", config=LLAMA)


def save_llama(folder: Path, size: str = "1GB") -> Path:
    """Save a llama as Hugging Face does, in files of at most this size; return the folder."""
    make_llama().save_pretrained(folder, max_shard_size=size)  # pyright: ignore[reportCallIssue]
    return folder
