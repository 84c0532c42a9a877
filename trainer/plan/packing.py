"""What each uplink would send of the same vectors, and how long packing them takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from trainer.codecs import Cast, Codec, Full, Int4, Int8, TopK, Uplink
from trainer.packed import FEW, wire_of
from trainer.plan.clock import seconds_of
from trainer.plan.costs import Packing
from trainer.run import Run

OFFERED: tuple[Uplink, ...] = (Full(), Cast("bfloat16"), Int8(), Int4(), TopK())
SAMPLE = 1 << 20  # numbers that are packed for the time it takes


def packings(run: Run, vectors: Sequence[Tensor]) -> dict[str, Packing]:
    """By the name of each uplink that the run can have, its own first: what a round of these vectors comes to."""
    found: dict[str, Packing] = {}
    for uplink in (run.uplink, *OFFERED):
        if vectors and uplink.name not in found:
            with suppress(ValueError):  # the algorithm's vectors cannot be packed
                replace(run, uplink=uplink)
                found[uplink.name] = _packing(run, uplink, vectors)
    return found


def residuals(run: Run, vectors: Sequence[Tensor]) -> int:
    """The bytes of what packing has lost, which this rank keeps for the next round."""
    if isinstance(run.uplink, Full):
        return 0
    silos = run.topology.num_silos
    of_sums = 1 / silos if silos > FEW else 0
    return round((1 + of_sums) * sum(vector.nbytes for vector in vectors) / run.topology.num_slices)


def _packing(run: Run, uplink: Uplink, vectors: Sequence[Tensor]) -> Packing:
    wire = wire_of(run.topology, uplink)
    sent = sum(wire.bytes_of(vector) for vector in vectors)
    numbers = sum(len(vector) for vector in vectors) // run.topology.num_slices
    seconds = 0.0 if isinstance(uplink, Full) else numbers * _seconds_of_number(uplink, run)
    return Packing(sent, seconds)


def _seconds_of_number(codec: Codec, run: Run) -> float:
    """Of a number on its way: packed, and unpacked in all that come in; see Packed."""
    silos = run.topology.num_silos
    packs, unpacks = (1.0, float(silos)) if silos <= FEW else (1 + 1 / silos, 3 + 1 / silos)
    values = torch.randn(SAMPLE, device=run.topology.device)
    packed = torch.zeros(codec.size(SAMPLE), dtype=torch.uint8, device=values.device)
    into = torch.empty_like(values)

    def unpack() -> None:
        codec.unpack(packed, into)
        into.add_(values)

    packing = seconds_of(lambda: codec.pack(values, packed, 0), values.device)
    return (packs * packing + unpacks * seconds_of(unpack, values.device)) / SAMPLE
