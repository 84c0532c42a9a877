"""Data: sources of examples, the data sets that come along, and the clients that examples are dealt to."""

from __future__ import annotations

from trainer.data.loading.fingerprint import checksum, fingerprint
from trainer.data.partition.clients import Clients, describe
from trainer.data.partition.consistent_hashing import Hash
from trainer.data.partition.partition import (
    Dirichlet,
    Iid,
    Natural,
    Partition,
    Quantity,
    Shards,
    Similarity,
    count_natural_clients,
)
from trainer.data.readers.cifar import cifar10
from trainer.data.readers.huggingface import saved_dataset
from trainer.data.readers.idx import read_idx
from trainer.data.readers.image_folder import image_folder
from trainer.data.readers.mnist import digits, fashion_mnist, mnist
from trainer.data.readers.npz import npz
from trainer.data.readers.parquet import parquet
from trainer.data.readers.text import BYTES, shakespeare, text
from trainer.data.readers.tokens import TokenSource, tokens
from trainer.data.sources.base import DataSplits, MapDatasetSource, SequenceWindows, Source, TensorSource, as_source
from trainer.data.sources.example_weights import ExampleWeights
from trainer.data.sources.iterable import IterableSource
from trainer.data.sources.per_client import PerClientSource, is_sequential, per_client_partition

__all__ = [
    "BYTES",
    "PerClientSource",
    "TensorSource",
    "Clients",
    "Dirichlet",
    "Hash",
    "Iid",
    "IterableSource",
    "MapDatasetSource",
    "Natural",
    "Partition",
    "Quantity",
    "Shards",
    "Similarity",
    "Source",
    "DataSplits",
    "TokenSource",
    "ExampleWeights",
    "SequenceWindows",
    "as_source",
    "checksum",
    "cifar10",
    "per_client_partition",
    "describe",
    "digits",
    "fashion_mnist",
    "fingerprint",
    "image_folder",
    "is_sequential",
    "mnist",
    "count_natural_clients",
    "npz",
    "parquet",
    "read_idx",
    "saved_dataset",
    "shakespeare",
    "text",
    "tokens",
]
