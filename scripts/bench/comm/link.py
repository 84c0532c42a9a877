"""Workers of one thread on two simulated hosts, joined by a link of a given rate. It needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.network_namespaces import LINK, new_hosts

PORT = 29741


def in_workers_on_hosts(module: str, rate: str | None, hosts: int = 2) -> bool:
    """Return whether this process is a worker; if not, run `python -m module` with the same arguments on each host.

    `rate` is in the notation of tc(8), such as 100mbit; None means as fast as this machine. Raises CalledProcessError
    if a worker fails.
    """
    if "RANK" in os.environ:
        return True
    with new_hosts(hosts) as made, ExitStack() as stack:
        variables = {"MASTER_ADDR": made[0].address, "MASTER_PORT": str(PORT), "WORLD_SIZE": str(hosts)}
        command = [sys.executable, "-W", "ignore", "-m", module, *sys.argv[1:]]
        workers = []
        for host in made:
            if rate:
                host.limit(rate)
            environment = {**os.environ, **variables, "RANK": str(host.number), "OMP_NUM_THREADS": "1"}
            workers.append(stack.enter_context(subprocess.Popen([*host.inside, *command], env=environment)))
        codes = [worker.wait() for worker in workers]
    if any(codes):
        raise subprocess.CalledProcessError(max(codes), command)
    return False


def sent_through_link() -> float:
    """Return the bytes that all hosts have sent through their interfaces so far, including all headers."""
    sent = torch.tensor(_sent_by_host(), dtype=torch.float64)
    dist.all_reduce(sent)
    return float(sent)


def _sent_by_host() -> int:
    counters = dict(line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line)
    return int({name.strip(): numbers.split()[8] for name, numbers in counters.items()}[LINK])
