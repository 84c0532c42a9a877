"""Data: sources of examples, the data sets that come along, and the clients that examples are dealt to."""

from __future__ import annotations

from trainer.data.apart import Apart, clients_apart, is_in_order
from trainer.data.cifar import cifar10
from trainer.data.clients import Clients, describe
from trainer.data.fingerprint import checksum, fingerprint
from trainer.data.folders import image_folder
from trainer.data.hashing import Hash
from trainer.data.idx import read_idx
from trainer.data.images import digits, fashion_mnist, mnist
from trainer.data.in_order import InOrder
from trainer.data.npz import npz
from trainer.data.parquet import parquet
from trainer.data.partition import Dirichlet, Iid, Natural, Partition, Quantity, Shards, Similarity, natural_clients
from trainer.data.saved import saved_dataset
from trainer.data.source import Arrays, MapStyle, Source, Splits, Windows, as_source
from trainer.data.texts import BYTES, shakespeare, text
from trainer.data.tokens import Tokens, tokens
from trainer.data.weights import Weights

__all__ = [
    "BYTES",
    "Apart",
    "Arrays",
    "Clients",
    "Dirichlet",
    "Hash",
    "Iid",
    "InOrder",
    "MapStyle",
    "Natural",
    "Partition",
    "Quantity",
    "Shards",
    "Similarity",
    "Source",
    "Splits",
    "Tokens",
    "Weights",
    "Windows",
    "as_source",
    "checksum",
    "cifar10",
    "clients_apart",
    "describe",
    "digits",
    "fashion_mnist",
    "fingerprint",
    "image_folder",
    "is_in_order",
    "mnist",
    "natural_clients",
    "npz",
    "parquet",
    "read_idx",
    "saved_dataset",
    "shakespeare",
    "text",
    "tokens",
]
