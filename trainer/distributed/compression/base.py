"""What a codec is, and the pieces in which it works."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

CPU_CHUNK_LENGTH = 1 << 17  # values that several operations go over while they lie in a processor's cache of 2 MB


class Codec(Protocol):
    """Abstract: packs a vector of numbers into bytes, whose number is known before, and unpacks them.

    Values are finite, float32 or float64, one-dimensional. What is unpacked are float32 numbers, the same bits on every
    rank, and rounded once more where the memory for them has less; what is lost is left to error feedback. Packed
    vectors are uint8, contiguous, and begin at a multiple of 4 bytes.

    name  the choice of `update_compression=`
    """

    name: str

    def encoded_size(self, count: int) -> int:
        """The bytes of so many values, a multiple of 4."""
        ...

    def encode(self, values: Tensor, packed: Tensor, seed: int) -> None:
        """Writes the values [count] as bytes [size(count)]. What is random in them is a pure function of the seed."""
        ...

    def decode(self, packed: Tensor, values: Tensor) -> None:
        """Writes what the bytes [size(count)] stand for into the values [count], in their dtype."""
        ...


class Uncompressed:
    """No codec: numbers travel as they are, in float32, or in float64 of a float64 model."""

    name = "fp32"


class PowerSGD:
    """No codec: matrices travel as products of two thin ones of this rank, what is no matrix as it is."""

    name = "powersgd"

    def __init__(self, rank: int = 4):
        if rank < 1:
            raise ValueError(f"update_compression.rank={rank}\n  valid: a whole number from 1")
        self.rank = rank


UpdateCompression = Codec | Uncompressed | PowerSGD


def multiple_of_4(size: int) -> int:
    """The smallest multiple of 4 that is not smaller."""
    return -(-size // 4) * 4


def chunk_length(values: Tensor) -> int:
    """How many values to work on at a time: on a GPU all, where a kernel costs more than memory."""
    return CPU_CHUNK_LENGTH if values.device.type == "cpu" else max(values.numel(), 1)
