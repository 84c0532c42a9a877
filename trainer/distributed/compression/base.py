"""The interface of codecs, the choices without one, and the chunks in which codecs work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

CPU_CHUNK_LENGTH = 1 << 17  # values: several operations go over them while they are in a cache of 2 MB


class Codec(ABC):
    """Abstract: encodes a vector as bytes, whose number depends on its length alone, and decodes them.

    Values are finite, one-dimensional, float32 or float64. Decoded values are float32 numbers with the same bits on
    every rank, rounded again if their tensor has fewer bits. Error feedback makes up for the loss. Encoded vectors
    are uint8, contiguous, and start at a multiple of 4 bytes. A subclass needs the name and the three methods.

    name         the choice of `update_compression=`
    is_identity  whether vectors travel as they are
    matrix_rank  the columns of the thin matrices as whose products matrices travel; None where vectors travel whole
    """

    name: str
    is_identity: Literal[False] = False
    matrix_rank: None = None

    @abstractmethod
    def encoded_size(self, count: int) -> int:
        """Return the bytes of `count` values, a multiple of 4."""

    @abstractmethod
    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        """Encode a vector. Random numbers, if any, are a pure function of the seed.

        Args:
            values: the vector [count]
            packed: the output [encoded_size(count)], uint8
            seed: of this vector
        """

    @abstractmethod
    def decode(self, packed: Tensor, values: Tensor) -> None:
        """Decode bytes [encoded_size(count)] into the values [count], in their dtype."""


class Uncompressed:
    """No codec: numbers travel in float32, or in float64 if the model is float64."""

    name = "fp32"
    is_identity: Literal[True] = True
    matrix_rank: None = None


class PowerSGD:
    """No codec: matrices travel as products of two thin ones, and other parameters as they are.

    Args:
        rank: the columns of the thin matrices

    Raises:
        ValueError: the rank is below 1
    """

    name = "powersgd"
    is_identity: Literal[False] = False
    matrix_rank: int
    needs_one_world = True  # the silos exchange one factor of a matrix, and then the other

    def __init__(self, rank: int = 4):
        if rank < 1:
            raise ValueError(f"update_compression.rank={rank}\n  valid: a whole number from 1")
        self.matrix_rank = rank


# The attributes of a codec tell them apart: `name`, `is_identity` and `matrix_rank`.
UpdateCompression = Codec | Uncompressed | PowerSGD


def multiple_of_4(size: int) -> int:
    """Round up to a multiple of 4."""
    return -(-size // 4) * 4


def chunk_length(values: Tensor) -> int:
    """Return the number of values to work on at a time; all on a GPU, where a kernel costs more than memory."""
    return CPU_CHUNK_LENGTH if values.device.type == "cpu" else max(values.numel(), 1)
