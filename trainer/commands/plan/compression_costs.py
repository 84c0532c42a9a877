"""What each uplink would send of the same vectors, and how long packing them takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from trainer.commands.plan.cost_model import CompressionCost
from trainer.distributed.compression import Cast, Codec, Int4, Int8, PowerSGD, TopK, Uncompressed, UpdateCompression
from trainer.distributed.transport import make_transport
from trainer.distributed.transport.compressed import MAX_DIRECT_SILOS
from trainer.distributed.transport.low_rank import multiply
from trainer.loop.run import Run
from trainer.models.flat import parameter_layout
from trainer.utils.timing import median_seconds

Vectors = Sequence[tuple[Tensor, int]]  # without numbers, and where in a whole vector each begins

OFFERED: tuple[UpdateCompression, ...] = (Uncompressed(), Cast("bfloat16"), Int8(), Int4(), TopK())
SAMPLE = 1 << 20  # numbers that are packed for the time it takes
COLUMNS = 1 << 10  # of them, where they are a matrix


def compression_costs(run: Run, vectors: Vectors) -> dict[str, CompressionCost]:
    """By the name of each uplink that the run can have, its own first: what a round of these vectors comes to."""
    found: dict[str, CompressionCost] = {}
    for uplink in (run.update_compression, *OFFERED):
        if vectors and uplink.name not in found:
            with suppress(ValueError):  # the algorithm's vectors cannot be packed
                replace(run, update_compression=uplink)
                found[uplink.name] = _compression_cost(run, uplink, vectors)
    return found


def residual_bytes(run: Run, vectors: Vectors) -> int:
    """The bytes of what packing has lost, which this rank keeps for the next round."""
    if isinstance(run.update_compression, Uncompressed):
        return 0
    silos = run.topology.num_silos
    of_sums = 1 / silos if silos > MAX_DIRECT_SILOS and not isinstance(run.update_compression, PowerSGD) else 0
    return round((1 + of_sums) * sum(vector.nbytes for vector, _ in vectors) / run.topology.num_shards)


def _compression_cost(run: Run, compression: UpdateCompression, vectors: Vectors) -> CompressionCost:
    wire = make_transport(run.topology, compression, parameter_layout(run.module, run.algorithm.is_shared))
    sent = sum(wire.all_reduce_bytes(vector, offset) for vector, offset in vectors)
    numbers = sum(len(vector) for vector, _ in vectors) // run.topology.num_shards
    return CompressionCost(sent, numbers * _seconds_per_number(compression, run))


def _seconds_per_number(compression: UpdateCompression, run: Run) -> float:
    """Of a number on its way, beyond what a sum takes."""
    if isinstance(compression, Uncompressed):
        return 0.0
    return (
        _low_rank_seconds(compression.rank, run)
        if isinstance(compression, PowerSGD)
        else _codec_seconds(compression, run)
    ) / SAMPLE


def _low_rank_seconds(rank: int, run: Run) -> float:
    """The products that PowerSGDAllReduce makes of a sample: M Q, M^T P, M - P Q^T, P Q^T."""
    matrix = torch.randn(SAMPLE // COLUMNS, COLUMNS, device=run.topology.device)
    p, q = matrix[:, :rank].clone(), matrix[:rank].T.clone()
    total = torch.empty_like(matrix)

    def act() -> None:
        matrix.add_(total)
        torch.addmm(matrix, matrix @ q, (matrix.T @ p).T, alpha=-1, out=total)
        multiply(p, q, total)

    return median_seconds(act, matrix.device)


def _codec_seconds(codec: Codec, run: Run) -> float:
    """A sample packed, and unpacked in all that come in; see Packed."""
    silos = run.topology.num_silos
    packs, unpacks = (1.0, float(silos)) if silos <= MAX_DIRECT_SILOS else (1 + 1 / silos, 3 + 1 / silos)
    values = torch.randn(SAMPLE, device=run.topology.device)
    packed = torch.zeros(codec.encoded_size(SAMPLE), dtype=torch.uint8, device=values.device)
    into = torch.empty_like(values)

    def unpack() -> None:
        codec.decode(packed, into)
        into.add_(values)

    packing = median_seconds(lambda: codec.encode(values, packed, 0), values.device)
    return packs * packing + unpacks * median_seconds(unpack, values.device)
