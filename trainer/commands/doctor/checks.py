"""What would go wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.run_dir import RunFolder
from trainer.commands.doctor.examine import Examination
from trainer.commands.probe.host_facts import Facts
from trainer.commands.probe.network_interfaces import LOOPBACK
from trainer.config.schema import Config

MOST_NAMED = 4
LEAST_DISK, LEAST_MEMORY, LEAST_SHM = 1.0, 0.5, 0.06  # GiB; memory is for each rank
SECONDS_APART = 1.0
MUST_AGREE = ("torch", "NCCL", "silotrain")


class Finding(NamedTuple):
    """A sentence with the way out, and whether a run would fail; else it would be slow, or say what is not so."""

    is_wrong: bool
    text: str
    way_out: str


def findings(exam: Examination, config: Config, tree: dict[str, object]) -> list[Finding]:
    """All that was found, what would go wrong first."""
    found = [finding for look in LOOKS for finding in look(exam, config)]
    try:
        RunFolder(Path(str(config.run_dir))).check(tree)
    except ValueError as error:
        text, _, way_out = str(error).rpartition("\n  ")
        found.append(Finding(True, text or str(error), way_out))
    return sorted(found, key=lambda finding: not finding.is_wrong)


def named(items: Iterable[object]) -> str:
    """The first few, and how many more there are.

    >>> named(range(7))
    '0, 1, 2, 3 and 3 more'
    """
    distinct = list(dict.fromkeys(map(str, items)))
    more = f" and {len(distinct) - MOST_NAMED} more" if len(distinct) > MOST_NAMED else ""
    return ", ".join(distinct[:MOST_NAMED]) + more


def _hosts(facts: Iterable[Facts]) -> str:
    return named(each.host for each in facts)


def _network(exam: Examination, config: Config) -> Iterator[Finding]:
    """Nodes that others cannot reach, and why: most often a host's name that leads to its own loopback."""
    unreached = {there.node: (there, fault) for _, there, fault in exam.unreached}
    looped = [there for there, _ in unreached.values() if there.address.startswith(LOOPBACK)]
    if looped:
        proposed = named(each.proposed for each in looped if each.proposed)
        yield Finding(
            True,
            f"gloo would use {named(each.address for each in looped)} on {_hosts(looped)}, to which the name of the "
            "host resolves there: the other hosts cannot reach that",
            f"set GLOO_SOCKET_IFNAME={proposed or 'the interface between the hosts'} on every host, "
            "or take the name out of the line of 127.0.1.1 in /etc/hosts",
        )
    for here, there, fault in exam.unreached[:MOST_NAMED]:
        if there not in looped:
            yield Finding(
                True,
                f"{here.host} (rank {here.rank}) cannot reach {there.host} (rank {there.rank}) at "
                f"{there.address}, interface {there.interface}, port {there.port}: {fault}",
                "open the ports between the hosts: ranks use any of those that the system gives; "
                "or choose another interface by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            )
    if exam.links_fault:
        way_out = "look at the interfaces above: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose others"
        yield Finding(True, f"a connection between ranks failed: {exam.links_fault}", way_out)


def _versions(exam: Examination, config: Config) -> Iterator[Finding]:
    for name in exam.facts[0].versions:
        by_version: dict[str, list[Facts]] = {}
        for facts in exam.facts:
            by_version.setdefault(facts.versions[name], []).append(facts)
        if len(by_version) > 1:
            said = "; ".join(f"{version} on {_hosts(facts)}" for version, facts in by_version.items())
            yield Finding(name in MUST_AGREE, f"{name} is not the same on all ranks: {said}", "install one version")


def _clocks(exam: Examination, config: Config) -> Iterator[Finding]:
    ahead = {heard.node: heard.ahead for heard in exam.heard.get(0, []) if abs(heard.ahead) > SECONDS_APART}
    for facts in exam.first_ranks:
        if facts.node in ahead:
            text = f"the clock of {facts.host} is {ahead[facts.node]:+.1f} s off that of {exam.facts[0].host}"
            yield Finding(False, f"{text}: logs and the ages of files mislead", "start an NTP service there")


def _threads(exam: Examination, config: Config) -> Iterator[Finding]:
    for node in exam.first_ranks:
        ranks = [facts for facts in exam.facts if facts.node == node.node]
        threads, cores = sum(facts.threads for facts in ranks), len({core for facts in ranks for core in facts.cores})
        if threads > max(cores, len(ranks)) or len(ranks) > cores:
            text = (
                f"{node.host}: {len(ranks)} ranks with launch.threads_per_worker={ranks[0].threads} share {cores} cores"
            )
            way_out = f"set launch.threads_per_worker={max(1, cores // len(ranks))}"
            yield Finding(
                False, text, way_out if len(ranks) <= cores else "start fewer ranks there, or give it more cores"
            )
    fighting = [facts for facts in exam.facts if facts.omp and facts.omp != str(facts.threads)]
    if fighting:
        first = fighting[0]
        text = f"OMP_NUM_THREADS={first.omp} is not heeded: launch.threads_per_worker={first.threads} counts"
        yield Finding(False, text, f"set launch.threads_per_worker={first.omp}, or leave OMP_NUM_THREADS out")


def _gpus(exam: Examination, config: Config) -> Iterator[Finding]:
    users: dict[tuple[str, str], list[int]] = {}
    for facts in exam.facts:
        if facts.gpu:
            users.setdefault((facts.host, facts.gpu), []).append(facts.rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1 and config.launch.backend != "gloo":
            text = f"ranks {named(ranks)} are on one GPU of {host}, {gpu}: NCCL refuses that"
            way_out = "start one rank a GPU, or let CUDA_VISIBLE_DEVICES show each rank another; or launch.backend=gloo"
            yield Finding(True, text, way_out)
    idle = [facts for facts in exam.first_ranks if facts.has_nvidia and not facts.has_cuda]
    if idle and config.launch.device != "cpu":
        text = f"{_hosts(idle)} has an NVIDIA device, but torch {idle[0].versions['torch']} cannot use it"
        way_out = "install a build of torch with CUDA and a driver that fits it, or set launch.device=cpu"
        yield Finding(config.launch.device == "cuda", text, way_out)


def _room(exam: Examination, config: Config) -> Iterator[Finding]:
    nodes = exam.first_ranks
    if full := [facts for facts in nodes if facts.disk < LEAST_DISK]:
        text = f"{_hosts(full)}: {min(facts.disk for facts in full):.2f} GiB are free where run_dir={config.run_dir} is"
        yield Finding(True, text, "choose a run_dir with more room; checkpoint.keep_last=1 keeps fewer checkpoints")
    ranks_on = {node.node: sum(facts.node == node.node for facts in exam.facts) for node in nodes}
    if short := [facts for facts in nodes if facts.memory < LEAST_MEMORY * ranks_on[facts.node]]:
        text = f"{_hosts(short)}: {min(facts.memory for facts in short):.2f} GiB of memory are free for its ranks"
        yield Finding(True, text, "start fewer ranks there, or end what else is running")
    if small := [facts for facts in nodes if facts.shm < LEAST_SHM and facts.gpu]:
        text = f"{_hosts(small)}: {min(facts.shm for facts in small):.2f} GiB are free in /dev/shm, which NCCL uses"
        yield Finding(True, text, "make it larger: docker run --shm-size=1g, or set NCCL_SHM_DISABLE=1")


def _folder(exam: Examination, config: Config) -> Iterator[Finding]:
    nodes = {facts.node: facts for facts in exam.first_ranks}
    if faults := {node: view.fault for node, view in exam.views.items() if view.fault}:
        text = f"run_dir={config.run_dir} cannot be written on {_hosts(nodes[node] for node in faults)}"
        yield Finding(True, f"{text}: {next(iter(faults.values()))}", "choose another run_dir")
    elif apart := [nodes[node] for node, view in exam.views.items() if not view.is_same]:
        text = f"run_dir={config.run_dir} is not the same folder on {_hosts(apart)} as on {exam.facts[0].host}"
        must = config.require_shared_run_dir is True
        way_out = "put it on a disk that all hosts share" + (", or set require_shared_run_dir=false" if must else "")
        yield Finding(must, text + ("" if must else ": each host keeps checkpoints of its own"), way_out)


LOOKS: tuple[Callable[[Examination, Config], Iterator[Finding]], ...] = (
    *(_network, _gpus, _folder, _room),
    *(_versions, _clocks, _threads),
)
