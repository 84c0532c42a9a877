"""What would go wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.run_dir import RunDir
from trainer.commands.doctor.examine import HostSurvey
from trainer.commands.probe.host_facts import HostFacts
from trainer.commands.probe.network_interfaces import LOOPBACK
from trainer.config.schema import Config

MAX_NAMED = 4
MIN_DISK, MIN_MEMORY, MIN_SHM = 1.0, 0.5, 0.06  # GiB; memory is for each rank
MAX_CLOCK_SKEW_SECONDS = 1.0
MUST_AGREE = ("torch", "NCCL", "silotrain")


class Diagnosis(NamedTuple):
    """A sentence with the way out, and whether a run would fail; else it would be slow, or say what is not so."""

    is_error: bool
    text: str
    remedy: str


def diagnose(survey: HostSurvey, config: Config, tree: dict[str, object]) -> list[Diagnosis]:
    """All that was found, what would go wrong first."""
    found = [finding for look in CHECKS for finding in look(survey, config)]
    try:
        RunDir(Path(str(config.run_dir))).check(tree)
    except ValueError as error:
        text, _, way_out = str(error).rpartition("\n  ")
        found.append(Diagnosis(True, text or str(error), way_out))
    return sorted(found, key=lambda finding: not finding.is_error)


def first_few(items: Iterable[object]) -> str:
    """The first few, and how many more there are.

    >>> named(range(7))
    '0, 1, 2, 3 and 3 more'
    """
    distinct = list(dict.fromkeys(map(str, items)))
    more = f" and {len(distinct) - MAX_NAMED} more" if len(distinct) > MAX_NAMED else ""
    return ", ".join(distinct[:MAX_NAMED]) + more


def _hosts(facts: Iterable[HostFacts]) -> str:
    return first_few(each.host for each in facts)


def _network(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    """Nodes that others cannot reach, and why: most often a host's name that leads to its own loopback."""
    unreached = {there.node: (there, fault) for _, there, fault in survey.unreachable}
    looped = [there for there, _ in unreached.values() if there.address.startswith(LOOPBACK)]
    if looped:
        proposed = first_few(each.proposed for each in looped if each.proposed)
        yield Diagnosis(
            True,
            f"gloo would use {first_few(each.address for each in looped)} on {_hosts(looped)}, to which the name of the "
            "host resolves there: the other hosts cannot reach that",
            f"set GLOO_SOCKET_IFNAME={proposed or 'the interface between the hosts'} on every host, "
            "or take the name out of the line of 127.0.1.1 in /etc/hosts",
        )
    for here, there, fault in survey.unreachable[:MAX_NAMED]:
        if there not in looped:
            yield Diagnosis(
                True,
                f"{here.host} (rank {here.rank}) cannot reach {there.host} (rank {there.rank}) at "
                f"{there.address}, interface {there.interface}, port {there.port}: {fault}",
                "open the ports between the hosts: ranks use any of those that the system gives; "
                "or choose another interface by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            )
    if survey.links_error:
        way_out = "look at the interfaces above: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose others"
        yield Diagnosis(True, f"a connection between ranks failed: {survey.links_error}", way_out)


def _versions(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    for name in survey.facts[0].versions:
        by_version: dict[str, list[HostFacts]] = {}
        for facts in survey.facts:
            by_version.setdefault(facts.versions[name], []).append(facts)
        if len(by_version) > 1:
            said = "; ".join(f"{version} on {_hosts(facts)}" for version, facts in by_version.items())
            yield Diagnosis(name in MUST_AGREE, f"{name} is not the same on all ranks: {said}", "install one version")


def _clocks(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    ahead = {
        heard.node: heard.clock_offset
        for heard in survey.pings.get(0, [])
        if abs(heard.clock_offset) > MAX_CLOCK_SKEW_SECONDS
    }
    for facts in survey.first_ranks:
        if facts.node in ahead:
            text = f"the clock of {facts.host} is {ahead[facts.node]:+.1f} s off that of {survey.facts[0].host}"
            yield Diagnosis(False, f"{text}: logs and the ages of files mislead", "start an NTP service there")


def _threads(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    for node in survey.first_ranks:
        ranks = [facts for facts in survey.facts if facts.node == node.node]
        threads, cores = sum(facts.threads for facts in ranks), len({core for facts in ranks for core in facts.cores})
        if threads > max(cores, len(ranks)) or len(ranks) > cores:
            text = (
                f"{node.host}: {len(ranks)} ranks with launch.threads_per_worker={ranks[0].threads} share {cores} cores"
            )
            way_out = f"set launch.threads_per_worker={max(1, cores // len(ranks))}"
            yield Diagnosis(
                False, text, way_out if len(ranks) <= cores else "start fewer ranks there, or give it more cores"
            )
    fighting = [facts for facts in survey.facts if facts.omp and facts.omp != str(facts.threads)]
    if fighting:
        first = fighting[0]
        text = f"OMP_NUM_THREADS={first.omp} is not heeded: launch.threads_per_worker={first.threads} counts"
        yield Diagnosis(False, text, f"set launch.threads_per_worker={first.omp}, or leave OMP_NUM_THREADS out")


def _gpus(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    users: dict[tuple[str, str], list[int]] = {}
    for facts in survey.facts:
        if facts.gpu:
            users.setdefault((facts.host, facts.gpu), []).append(facts.rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1 and config.launch.backend != "gloo":
            text = f"ranks {first_few(ranks)} are on one GPU of {host}, {gpu}: NCCL refuses that"
            way_out = "start one rank a GPU, or let CUDA_VISIBLE_DEVICES show each rank another; or launch.backend=gloo"
            yield Diagnosis(True, text, way_out)
    idle = [facts for facts in survey.first_ranks if facts.has_nvidia and not facts.has_cuda]
    if idle and config.launch.device != "cpu":
        text = f"{_hosts(idle)} has an NVIDIA device, but torch {idle[0].versions['torch']} cannot use it"
        way_out = "install a build of torch with CUDA and a driver that fits it, or set launch.device=cpu"
        yield Diagnosis(config.launch.device == "cuda", text, way_out)


def _free_space(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    nodes = survey.first_ranks
    if full := [facts for facts in nodes if facts.disk < MIN_DISK]:
        text = f"{_hosts(full)}: {min(facts.disk for facts in full):.2f} GiB are free where run_dir={config.run_dir} is"
        yield Diagnosis(True, text, "choose a run_dir with more room; checkpoint.keep_last=1 keeps fewer checkpoints")
    ranks_on = {node.node: sum(facts.node == node.node for facts in survey.facts) for node in nodes}
    if short := [facts for facts in nodes if facts.memory < MIN_MEMORY * ranks_on[facts.node]]:
        text = f"{_hosts(short)}: {min(facts.memory for facts in short):.2f} GiB of memory are free for its ranks"
        yield Diagnosis(True, text, "start fewer ranks there, or end what else is running")
    if small := [facts for facts in nodes if facts.shm < MIN_SHM and facts.gpu]:
        text = f"{_hosts(small)}: {min(facts.shm for facts in small):.2f} GiB are free in /dev/shm, which NCCL uses"
        yield Diagnosis(True, text, "make it larger: docker run --shm-size=1g, or set NCCL_SHM_DISABLE=1")


def _folder(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    nodes = {facts.node: facts for facts in survey.first_ranks}
    if errors := {node: view.error for node, view in survey.views.items() if view.error}:
        text = f"run_dir={config.run_dir} cannot be written on {_hosts(nodes[node] for node in errors)}"
        yield Diagnosis(True, f"{text}: {next(iter(errors.values()))}", "choose another run_dir")
    elif apart := [nodes[node] for node, view in survey.views.items() if not view.is_same]:
        text = f"run_dir={config.run_dir} is not the same folder on {_hosts(apart)} as on {survey.facts[0].host}"
        must = config.require_shared_run_dir is True
        way_out = "put it on a disk that all hosts share" + (", or set require_shared_run_dir=false" if must else "")
        yield Diagnosis(must, text + ("" if must else ": each host keeps checkpoints of its own"), way_out)


CHECKS: tuple[Callable[[HostSurvey, Config], Iterator[Diagnosis]], ...] = (
    *(_network, _gpus, _folder, _free_space),
    *(_versions, _clocks, _threads),
)
