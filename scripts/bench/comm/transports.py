"""Measure the cost and the saving of each update compression.

    python -m scripts.bench.comm.transports

Each choice of `update_compression=` is measured on one thread a silo: the CPU time of encoding and of decoding a
vector, the bytes that all silos send, and the time of the sum, both the CPU time of the first silo, collectives
included, and the time on the clock. The vector is one matrix of 1,000 columns. With --rate each silo is a host, and the
bytes that have left the interfaces are compared with those that the transports report.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.bench.comm.link import in_workers_on_hosts, sent_through_link
from scripts.bench.paired_timing import in_workers, machine
from trainer.algorithms.round import Round
from trainer.distributed.compression import Cast, Int4, Int8, PowerSGD, TopK, Uncompressed, UpdateCompression
from trainer.distributed.topology import Topology, distributed
from trainer.distributed.transport import Transport, make_transport

ALL: list[UpdateCompression] = [
    Uncompressed(),
    Cast("bfloat16"),
    Cast("float16"),
    Int8(),
    Int4(),
    TopK(0.01),
    PowerSGD(),
]
UPLINKS = {uplink.name: uplink for uplink in ALL}

COLUMNS = 1000


def timed(do: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Return the median milliseconds of a call; the first call is not counted."""
    taken = []
    for _ in range(times + 1):
        dist.barrier()
        began = clock()
        do()
        taken.append(clock() - began)
    return 1e3 * median(taken[1:])


def codec_times(compression: UpdateCompression, vector: Tensor, times: int) -> str:
    """Return the milliseconds of encoding and of decoding."""
    if isinstance(compression, Uncompressed | PowerSGD):
        return "- | -"
    packed, back = torch.zeros(compression.encoded_size(len(vector)), dtype=torch.uint8), torch.empty_like(vector)
    pack = timed(lambda: compression.encode(vector, packed, 0), times, time.thread_time)
    unpack = timed(lambda: compression.decode(packed, back), times, time.thread_time)
    return f"{pack:.1f} | {unpack:.1f}"


def sum_times(transport: Transport, vector: Tensor, times: int) -> tuple[float, float]:
    """Return the milliseconds of a sum, of a new vector each time: CPU time, and time on the clock."""
    one = torch.empty_like(vector)

    def do() -> None:
        for _ in transport.all_reduce_async(one.copy_(vector), "delta"):
            pass

    transport.start_round(Round(0, 0, ()).seed_for)
    return timed(do, times, time.process_time), timed(do, times, time.perf_counter)


def bench(topology: Topology, uplinks: Sequence[UpdateCompression], numbers: int, times: int, on_hosts: bool) -> None:
    """Print a row for each compression."""
    vector = torch.randn(numbers, generator=torch.Generator().manual_seed(topology.rank))
    plain = 0.0
    for uplink in uplinks:
        wire = make_transport(topology, uplink, [(0, vector.view(-1, COLUMNS).shape)])
        own = codec_times(uplink, vector, times)
        before = sent_through_link() if on_hosts else 0.0
        used, taken = sum_times(wire, vector, times)
        by_interfaces = f" {(sent_through_link() - before) / wire.bytes_sent:.3f} |" if on_hosts else ""
        plain = plain or taken
        if topology.rank == 0:
            sent = wire.bytes_sent / (2 * times + 2) / 1e6
            row = f"| {uplink.name} | {own} | {sent:.2f} | {used:.1f} | {taken:.1f} | {taken / plain:.3f} |"
            print(row + by_interfaces, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--times", type=int, default=9)
    parser.add_argument("--uplinks", nargs="+", choices=UPLINKS, default=list(UPLINKS))
    parser.add_argument("--rate", help="the rate of each silo's link, for tc(8): 100mbit")
    options = parser.parse_args()
    module = "scripts.bench.comm.transports"
    on_hosts = options.rate is not None
    is_worker = (
        in_workers_on_hosts(module, options.rate, options.silos) if on_hosts else in_workers(module, options.silos)
    )
    if not is_worker:
        return
    with distributed(options.silos, device="cpu") as topology:
        if topology.rank == 0:
            print(
                machine(), f"{options.silos} silos, {options.numbers:,} numbers", options.rate or "loopback", sep="; "
            )
            by_interfaces = " interfaces / reported |" if on_hosts else ""
            print("| uplink | pack ms | unpack ms | sent MB | sum: CPU ms | ms | of fp32 |" + by_interfaces)
        uplinks = [UPLINKS[name] for name in options.uplinks]
        bench(topology, uplinks, options.numbers, options.times, on_hosts)


if __name__ == "__main__":
    main()
