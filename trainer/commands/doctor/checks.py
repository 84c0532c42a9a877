"""Checks of a survey: each yields diagnoses of what would go wrong, with remedies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.run_dir import RunDir
from trainer.commands.doctor.examine import HostSurvey
from trainer.commands.probe.host_facts import HostFacts
from trainer.commands.probe.network import LOOPBACK
from trainer.config.schema import Config
from trainer.utils.text import first_few

MAX_NAMED = 4
MIN_DISK, MIN_MEMORY, MIN_SHM = 1.0, 0.5, 0.06  # GiB; memory is for each rank
MAX_CLOCK_OFFSET_SECONDS = 1.0
MUST_AGREE = ("torch", "NCCL", "silotrain")


class Diagnosis(NamedTuple):
    """A problem and its remedy.

    With `is_error` a run would fail; else it would be slow, or mislead.
    """

    is_error: bool
    text: str
    remedy: str


def diagnose(
    survey: HostSurvey, config: Config, tree: dict[str, object], others: Sequence[Diagnosis] = ()
) -> list[Diagnosis]:
    """Return the diagnoses of a survey for a run's configuration, and others, errors first."""
    checks = (_network, _gpus, _run_dir, _free_space, _versions, _clocks, _threads)
    diagnoses = [*others, *(diagnosis for check in checks for diagnosis in check(survey, config))]
    try:
        RunDir(Path(str(config.run_dir))).check(tree)
    except ValueError as error:
        text, _, remedy = str(error).rpartition("\n  ")
        diagnoses.append(Diagnosis(True, text or str(error), remedy))
    return sorted(diagnoses, key=lambda diagnosis: not diagnosis.is_error)


def enumerate_few(items: Iterable[object]) -> str:
    """Enumerate the first few distinct items."""
    return ", ".join(first_few(dict.fromkeys(items), MAX_NAMED))


def _hosts(facts: Iterable[HostFacts]) -> str:
    return enumerate_few(rank.host for rank in facts)


def _network(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    """Check that nodes reach each other.

    Most often the name of a host resolves to its loopback.
    """
    unreached = {target.node: target for _, target, _ in survey.unreachable}
    looped = [target for target in unreached.values() if target.address.startswith(LOOPBACK)]
    if looped:
        proposed = enumerate_few(target.proposed for target in looped if target.proposed)
        yield Diagnosis(
            True,
            f"gloo would use {enumerate_few(target.address for target in looped)} on {_hosts(looped)}, to which the "
            "name of the host resolves on that host: the other hosts cannot reach it",
            f"set GLOO_SOCKET_IFNAME={proposed or 'the interface between the hosts'} on every host, "
            "or remove the name from the line of 127.0.1.1 in /etc/hosts",
        )
    for source, target, error in survey.unreachable[:MAX_NAMED]:
        if target not in looped:
            yield Diagnosis(
                True,
                f"{source.host} (rank {source.rank}) cannot reach {target.host} (rank {target.rank}) at "
                f"{target.address}, interface {target.interface}, port {target.port}: {error}",
                "open the ports between the hosts: ranks listen at ports that the system chooses; "
                "or choose another interface by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            )
    if survey.links_error:
        remedy = "choose other interfaces than those listed, by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield Diagnosis(True, f"a connection between ranks failed: {survey.links_error}", remedy)


def _versions(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    for name in survey.facts[0].versions:
        by_version: dict[str, list[HostFacts]] = {}
        for facts in survey.facts:
            by_version.setdefault(facts.versions[name], []).append(facts)
        if len(by_version) > 1:
            found = "; ".join(f"{version} on {_hosts(facts)}" for version, facts in by_version.items())
            text = f"{name} is not the same on all ranks: {found}"
            yield Diagnosis(name in MUST_AGREE, text, "install one version on all hosts")


def _clocks(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    offsets = {result.node: result.clock_offset for result in survey.pings.get(0, [])}
    for facts in survey.first_ranks:
        offset = offsets.get(facts.node, 0.0)
        if abs(offset) > MAX_CLOCK_OFFSET_SECONDS:
            text = f"the clock of {facts.host} is {offset:+.1f} s off that of {survey.facts[0].host}"
            yield Diagnosis(False, f"{text}: logs and ages of files mislead", "start an NTP service on that host")


def _threads(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    for first in survey.first_ranks:
        ranks = [facts for facts in survey.facts if facts.node == first.node]
        threads, cores = sum(facts.threads for facts in ranks), len({core for facts in ranks for core in facts.cores})
        if threads > max(cores, len(ranks)) or len(ranks) > cores:
            setting = f"launch.threads_per_worker={first.threads}"
            remedy = f"set launch.threads_per_worker={cores // len(ranks)}"
            if len(ranks) > cores:
                remedy = "start fewer ranks on that host, or give it more cores"
            yield Diagnosis(False, f"{first.host}: {len(ranks)} ranks with {setting} share {cores} cores", remedy)
    ignored = [facts for facts in survey.facts if facts.omp and facts.omp != str(facts.threads)]
    if ignored:
        omp, threads = ignored[0].omp, ignored[0].threads
        text = f"OMP_NUM_THREADS={omp} is ignored: launch.threads_per_worker={threads} counts"
        yield Diagnosis(False, text, f"set launch.threads_per_worker={omp}, or unset OMP_NUM_THREADS")


def _gpus(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    users: dict[tuple[str, str], list[int]] = {}
    for facts in survey.facts:
        if facts.gpu:
            users.setdefault((facts.host, facts.gpu), []).append(facts.rank)
    for (host, gpu), ranks in users.items():
        if len(ranks) > 1 and config.launch.backend != "gloo":
            yield Diagnosis(
                True,
                f"ranks {enumerate_few(ranks)} are on one GPU of {host}, {gpu}, which NCCL refuses",
                "start one rank for each GPU, or show each rank another one by CUDA_VISIBLE_DEVICES; or set "
                "launch.backend=gloo",
            )
    unused = [facts for facts in survey.first_ranks if facts.has_nvidia and not facts.has_cuda]
    if unused and config.launch.device != "cpu":
        text = f"{_hosts(unused)} has an NVIDIA device that torch {unused[0].versions['torch']} cannot use"
        remedy = "install a build of torch with CUDA and a driver that fits it, or set launch.device=cpu"
        yield Diagnosis(config.launch.device == "cuda", text, remedy)


def _free_space(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    nodes, ranks = survey.first_ranks, Counter(facts.node for facts in survey.facts)
    if full := [facts for facts in nodes if facts.disk < MIN_DISK]:
        text = f"only {min(facts.disk for facts in full):.2f} GiB of disk are free for run_dir={config.run_dir}"
        remedy = "choose a run_dir with more space; checkpoint.keep_last=1 keeps fewer checkpoints"
        yield Diagnosis(True, f"{_hosts(full)}: {text}", remedy)
    if short := [facts for facts in nodes if facts.memory < MIN_MEMORY * ranks[facts.node]]:
        text = f"only {min(facts.memory for facts in short):.2f} GiB of memory are free for the ranks"
        yield Diagnosis(True, f"{_hosts(short)}: {text}", "start fewer ranks on that host, or end other processes")
    if small := [facts for facts in nodes if facts.shm < MIN_SHM and facts.gpu]:
        text = f"only {min(facts.shm for facts in small):.2f} GiB are free in /dev/shm, which NCCL uses"
        remedy = "enlarge it, as by docker run --shm-size=1g, or set NCCL_SHM_DISABLE=1"
        yield Diagnosis(True, f"{_hosts(small)}: {text}", remedy)


def _run_dir(survey: HostSurvey, config: Config) -> Iterator[Diagnosis]:
    nodes = {facts.node: facts for facts in survey.first_ranks}
    if errors := {node: view.error for node, view in survey.views.items() if view.error}:
        text = f"run_dir={config.run_dir} cannot be written on {_hosts(nodes[node] for node in errors)}"
        yield Diagnosis(True, f"{text}: {next(iter(errors.values()))}", "choose another run_dir")
    elif others := [nodes[node] for node, view in survey.views.items() if not view.is_same]:
        text = f"run_dir={config.run_dir} is not the same folder on {_hosts(others)} as on {survey.facts[0].host}"
        remedy = "choose a run_dir on a disk that all hosts share"
        if config.require_shared_run_dir is True:
            yield Diagnosis(True, text, f"{remedy}, or set require_shared_run_dir=false")
        else:
            yield Diagnosis(False, f"{text}: each host keeps checkpoints of its own", remedy)
