"""Sources of examples, readers of files, and partitions of examples among clients."""

from __future__ import annotations

from trainer.data.loading.fingerprint import checksum, fingerprint
from trainer.data.partition.base import Partition, per_client_partition, split_clients
from trainer.data.partition.clients import Clients, describe, label_columns
from trainer.data.partition.clusters import Clusters
from trainer.data.partition.consistent_hashing import Hash
from trainer.data.partition.partition import (
    Dirichlet,
    Iid,
    Natural,
    Quantity,
    Shards,
    Similarity,
    count_natural_clients,
)
from trainer.data.readers.chat import chat
from trainer.data.readers.cifar import cifar10
from trainer.data.readers.huggingface import saved_dataset
from trainer.data.readers.idx import read_idx
from trainer.data.readers.image_folder import image_folder
from trainer.data.readers.mnist import digits, fashion_mnist, mnist
from trainer.data.readers.npz import npz
from trainer.data.readers.tables import csv, jsonl, parquet
from trainer.data.readers.text import BYTES, shakespeare, text
from trainer.data.readers.tokens import TokenSource, tokens
from trainer.data.sources.base import DataSplits, SequenceWindows, Source, TensorSource, as_source
from trainer.data.sources.example_weights import ExampleWeights
from trainer.data.sources.padding import Padding
from trainer.data.sources.per_client import PerClientSource
from trainer.data.sources.table import TableEncoder
from trainer.data.sources.torch_datasets import IterableSource, MapDatasetSource, is_read_by_batch, is_sequential

__all__ = [
    "BYTES",
    "Clients",
    "Clusters",
    "DataSplits",
    "Dirichlet",
    "ExampleWeights",
    "Hash",
    "Iid",
    "IterableSource",
    "MapDatasetSource",
    "Natural",
    "Padding",
    "Partition",
    "PerClientSource",
    "Quantity",
    "SequenceWindows",
    "Shards",
    "Similarity",
    "Source",
    "TableEncoder",
    "TensorSource",
    "TokenSource",
    "as_source",
    "chat",
    "checksum",
    "cifar10",
    "count_natural_clients",
    "csv",
    "describe",
    "digits",
    "fashion_mnist",
    "fingerprint",
    "image_folder",
    "is_read_by_batch",
    "is_sequential",
    "jsonl",
    "label_columns",
    "mnist",
    "npz",
    "parquet",
    "per_client_partition",
    "read_idx",
    "saved_dataset",
    "shakespeare",
    "split_clients",
    "text",
    "tokens",
]
