"""What each uplink costs and saves: python -m scripts.bench_uplink [--silos 2] [--numbers 10000000]

For each choice of `uplink=`, on one thread a silo: the CPU time in which a vector is packed and unpacked, what all
silos send of it, and for its sum the CPU time of the first silo, its collectives included, and the time on the clock.
The vector is one matrix of 1,000 columns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.duel import in_workers, machine
from trainer.codecs import Cast, Full, Int4, Int8, PowerSGD, TopK, Uplink
from trainer.cohort import Round
from trainer.topology import Topology, distributed
from trainer.uplink import wire_of
from trainer.wires import Wire

UPLINKS: list[Uplink] = [Full(), Cast("bfloat16"), Cast("float16"), Int8(), Int4(), TopK(0.01), PowerSGD()]

COLUMNS = 1000


def timed(do: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """The median milliseconds of doing it, after a first time that is not counted."""
    taken = []
    for _ in range(times + 1):
        dist.barrier()
        began = clock()
        do()
        taken.append(clock() - began)
    return 1e3 * median(taken[1:])


def codec_times(uplink: Uplink, vector: Tensor, times: int) -> str:
    """Milliseconds of packing and of unpacking."""
    if isinstance(uplink, Full | PowerSGD):
        return "    -     -"
    packed, back = torch.zeros(uplink.size(len(vector)), dtype=torch.uint8), torch.empty_like(vector)
    pack = timed(lambda: uplink.pack(vector, packed, 0), times, time.thread_time)
    unpack = timed(lambda: uplink.unpack(packed, back), times, time.thread_time)
    return f"{pack:5.1f} {unpack:5.1f}"


def sum_times(wire: Wire, vector: Tensor, times: int) -> tuple[float, float]:
    """Milliseconds of a sum, of a new vector each time: of the processor, and on the clock."""
    one = torch.empty_like(vector)

    def do() -> None:
        for _ in wire.start(one.copy_(vector), "delta"):
            pass

    wire.begin_round(Round(0, 0, ()))
    return timed(do, times, time.process_time), timed(do, times, time.perf_counter)


def bench(topology: Topology, numbers: int, times: int) -> None:
    """Prints a line for each uplink."""
    vector = torch.randn(numbers, generator=torch.Generator().manual_seed(topology.rank))
    if topology.rank == 0:
        print(machine(), f"{topology.num_silos} silos, {numbers:,} numbers", sep="\n")
        print("uplink   pack unpack ms    sent MB  sum: CPU ms    ms")
    for uplink in UPLINKS:
        wire = wire_of(topology, uplink, [(0, vector.view(-1, COLUMNS).shape)])
        own = codec_times(uplink, vector, times)
        used, taken = sum_times(wire, vector, times)
        if topology.rank == 0:
            sent = wire.bytes_sent / (2 * times + 2) / 1e6
            print(f"{uplink.name:<7} {own:<15} {sent:8.1f} {used:8.1f} {taken:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    if in_workers("scripts.bench_uplink", options.silos):
        with distributed(options.silos, device="cpu") as topology:
            bench(topology, options.numbers, options.times)


if __name__ == "__main__":
    main()
