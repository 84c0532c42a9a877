"""Vectors that a site sends whole to the coordinator of a federation, which decodes and sums those of all sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.compression import Codec, UpdateCompression
from trainer.distributed.topology import Topology
from trainer.distributed.transport.base import Transport, chunks_of
from trainer.distributed.transport.error_feedback import ErrorFeedbackTransport


class Upload(Transport):
    """Sends vectors as they are."""

    def encode(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the leader of the site sends of these vectors, by name. Nothing else changes."""
        return dict(vectors)

    def commit(self, vectors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> None:
        """Take note that what `encode` has returned for these vectors was counted."""


class CompressedUpload(ErrorFeedbackTransport, Upload):
    """Sends vectors that a codec encodes, with error feedback.

    p = vector + residual is encoded, and p - decode(encode(p)) is the next residual once the site is counted. The
    leader encodes the whole vector and has the residual, so that both do not depend on the number of replicas.

    Args:
        topology: of this rank, in the federation
        codec: encodes vectors
    """

    def __init__(self, topology: Topology, codec: Codec):
        super().__init__(topology)
        self.codec: Codec = codec  # pyright: ignore[reportIncompatibleVariableOverride] (nobody changes it)

    def encode(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._encode(name, vector) for name, vector in vectors.items()} if self.topology.is_leader else {}

    def commit(self, vectors: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> None:
        for name, encoded in sent.items():
            for start, values, packed in _pieces(self.codec, vectors[name], encoded):
                decoded = torch.empty_like(values)
                self.codec.decode(packed, decoded)
                self.residuals.residual(name, "payload", start, values).add_(values).sub_(decoded)

    def state_dict(self) -> dict[str, Any]:
        return self.residuals.state_dict()

    def load_state_dicts(self, states: Iterable[Mapping[str, Any]], parts: Sequence[slice], same_world: bool) -> None:
        for state in states:
            self.residuals.load(state, parts, [], self.topology.device)

    def _encode(self, name: str, vector: Tensor) -> Tensor:
        encoded = torch.zeros(_encoded_bytes(self.codec, len(vector)), dtype=torch.uint8, device=vector.device)
        for start, values, packed in _pieces(self.codec, vector, encoded):
            seed = self.seed_for("uplink", name, "payload", self.topology.silo, start)
            self.codec.encode(self.residuals.residual(name, "payload", start, values) + values, packed, seed)
        return encoded


def upload_like(compression: UpdateCompression, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the names, dtypes and shapes of an upload of vectors like these. Their numbers mean nothing."""
    if compression.is_identity is True:
        return dict(like)
    assert compression.matrix_rank is None
    sizes = {name: _encoded_bytes(compression, len(vector)) for name, vector in like.items()}
    return {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}


def decode_upload(
    compression: UpdateCompression, sent: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Decode an upload.

    Args:
        compression: of the vectors
        sent: what has come, of the dtypes and shapes of `upload_like`
        like: vectors of the lengths, dtypes and devices of the encoded ones

    Raises:
        ValueError: it is no encoding of such vectors
    """
    if compression.is_identity is True:
        return {name: vector.to(like[name].device) for name, vector in sent.items()}
    assert compression.matrix_rank is None
    return {name: _decode(compression, encoded, like[name]) for name, encoded in sent.items()}


def _encoded_bytes(codec: Codec, length: int) -> int:
    return sum(codec.encoded_size(span.stop - span.start) for span in chunks_of(slice(0, length)))


def _decode(codec: Codec, encoded: Tensor, like: Tensor) -> Tensor:
    assert len(encoded) == _encoded_bytes(codec, len(like))
    vector = torch.empty_like(like, device=encoded.device)
    try:
        for _, values, packed in _pieces(codec, vector, encoded):
            codec.decode(packed, values)
    except (RuntimeError, IndexError) as error:  # of an index that is none
        raise ValueError(f"its update is no encoding of {codec.name}: {error}") from error
    return vector.to(like.device)


def _pieces(codec: Codec, vector: Tensor, encoded: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the start, the values and the bytes of each piece of a vector that is encoded by itself."""
    first = 0
    for span in chunks_of(slice(0, len(vector))):
        last = first + codec.encoded_size(span.stop - span.start)
        yield span.start, vector[span], encoded[first:last]
        first = last
