"""What each uplink would send of the same vectors, and how long packing them takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from trainer.commands.plan.cost_model import Packing
from trainer.distributed.compression import Cast, Codec, Full, Int4, Int8, PowerSGD, TopK, Uplink
from trainer.distributed.transport import wire_of
from trainer.distributed.transport.compressed import FEW
from trainer.distributed.transport.low_rank import multiply
from trainer.loop.run import Run
from trainer.models.flat import places_of
from trainer.utils.timing import seconds_of

Vectors = Sequence[tuple[Tensor, int]]  # without numbers, and where in a whole vector each begins

OFFERED: tuple[Uplink, ...] = (Full(), Cast("bfloat16"), Int8(), Int4(), TopK())
SAMPLE = 1 << 20  # numbers that are packed for the time it takes
COLUMNS = 1 << 10  # of them, where they are a matrix


def packings(run: Run, vectors: Vectors) -> dict[str, Packing]:
    """By the name of each uplink that the run can have, its own first: what a round of these vectors comes to."""
    found: dict[str, Packing] = {}
    for uplink in (run.update_compression, *OFFERED):
        if vectors and uplink.name not in found:
            with suppress(ValueError):  # the algorithm's vectors cannot be packed
                replace(run, update_compression=uplink)
                found[uplink.name] = _packing(run, uplink, vectors)
    return found


def residuals(run: Run, vectors: Vectors) -> int:
    """The bytes of what packing has lost, which this rank keeps for the next round."""
    if isinstance(run.update_compression, Full):
        return 0
    silos = run.topology.num_silos
    of_sums = 1 / silos if silos > FEW and not isinstance(run.update_compression, PowerSGD) else 0
    return round((1 + of_sums) * sum(vector.nbytes for vector, _ in vectors) / run.topology.num_slices)


def _packing(run: Run, uplink: Uplink, vectors: Vectors) -> Packing:
    wire = wire_of(run.topology, uplink, places_of(run.module, run.algorithm.is_shared))
    sent = sum(wire.bytes_of(vector, offset) for vector, offset in vectors)
    numbers = sum(len(vector) for vector, _ in vectors) // run.topology.num_slices
    return Packing(sent, numbers * _seconds_of_number(uplink, run))


def _seconds_of_number(uplink: Uplink, run: Run) -> float:
    """Of a number on its way, beyond what a sum takes."""
    if isinstance(uplink, Full):
        return 0.0
    return (_of_matrix(uplink.rank, run) if isinstance(uplink, PowerSGD) else _of_codec(uplink, run)) / SAMPLE


def _of_matrix(rank: int, run: Run) -> float:
    """The products that LowRank makes of a sample: M Q, M^T P, M - P Q^T, P Q^T."""
    matrix = torch.randn(SAMPLE // COLUMNS, COLUMNS, device=run.topology.device)
    p, q = matrix[:, :rank].clone(), matrix[:rank].T.clone()
    total = torch.empty_like(matrix)

    def act() -> None:
        matrix.add_(total)
        torch.addmm(matrix, matrix @ q, (matrix.T @ p).T, alpha=-1, out=total)
        multiply(p, q, total)

    return seconds_of(act, matrix.device)


def _of_codec(codec: Codec, run: Run) -> float:
    """A sample packed, and unpacked in all that come in; see Packed."""
    silos = run.topology.num_silos
    packs, unpacks = (1.0, float(silos)) if silos <= FEW else (1 + 1 / silos, 3 + 1 / silos)
    values = torch.randn(SAMPLE, device=run.topology.device)
    packed = torch.zeros(codec.size(SAMPLE), dtype=torch.uint8, device=values.device)
    into = torch.empty_like(values)

    def unpack() -> None:
        codec.unpack(packed, into)
        into.add_(values)

    packing = seconds_of(lambda: codec.pack(values, packed, 0), values.device)
    return packs * packing + unpacks * seconds_of(unpack, values.device)
