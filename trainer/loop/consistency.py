"""Consistency: models that must be equal are equal, bit for bit."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from trainer.distributed import collectives
from trainer.distributed.topology import Topology
from trainer.models.flat import FlatModel


def model_fingerprint(model: FlatModel) -> int:
    """Return a 64-bit hash of the bits of the trainable parameters."""
    return _hash(torch.cat([model.shared, model.personal])) if len(model.personal) else _hash(model.shared)


def check_consistency(topology: Topology, local: int, model: FlatModel) -> None:
    """Raise RuntimeError, on every rank alike, when models that must be equal are not. A collective.

    Args:
        topology: the ranks.
        local: the fingerprint of this rank's model at the end of its local work, which is equal within a silo.
        model: after the combination, with shared parameters that are equal everywhere.
    """
    position = (topology.silo, topology.part, topology.shard_rank)
    hashes = (local, _hash(model.shared), _hash(model.shared[model.repeated]))
    rows = collectives.all_gather_rows(torch.tensor([*position, *hashes])).tolist()
    leaders = {(silo, part): local for silo, part, _, local, *_ in reversed(rows)}
    differing = [rank for rank, (silo, part, _, local, *_) in enumerate(rows) if local != leaders[silo, part]]
    if differing:
        raise RuntimeError(f"Replicas have drifted apart: ranks {differing} differ from the first rank of their silo.")
    firsts = {part: shared for _, part, _, _, shared, _ in reversed(rows)}
    differing = [rank for rank, (_, part, _, _, shared, _) in enumerate(rows) if shared != firsts[part]]
    if differing:
        raise RuntimeError(f"The global model has drifted apart: ranks {differing} differ from the first silo.")
    firsts = {shard: repeated for _, _, shard, *_, repeated in reversed(rows)}
    differing = [rank for rank, (_, _, shard, *_, repeated) in enumerate(rows) if repeated != firsts[shard]]
    if differing:
        raise RuntimeError(f"Parts of the model have drifted apart: ranks {differing} differ in what all parts have.")


def _hash(vector: Tensor) -> int:
    digest = blake2b(vector.cpu().view(torch.uint8).numpy().data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
