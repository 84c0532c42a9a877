"""Measurements of a plan: rounds of all workers at the same time, then links."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch

from trainer.commands.plan.cost_model import (
    CostModel,
    LinkSpeed,
    SiloLoad,
    StageTimes,
    Star,
    Traffic,
    slowest_stage_times,
)
from trainer.commands.plan.dry_run import DryRun, measure_step_seconds
from trainer.commands.plan.memory import MemoryLines
from trainer.commands.plan.options import PlanOptions
from trainer.commands.plan.target_world import check_links, is_remote_run, leader_topology, remote_nodes
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.watchdog import watchdog
from trainer.commands.train.torch_settings import configure_torch
from trainer.config.build import build
from trainer.config.schema import Config
from trainer.distributed.peers import Peers
from trainer.distributed.silos import silo_sizes
from trainer.distributed.topology import Topology, distributed
from trainer.loop.run import Run

SECONDS = 3.0  # of each measurement
LINK_TIMEOUT_SECONDS = 300
COLLECTIVE_TIMEOUT_SECONDS = 60  # of a single collective


@dataclass(frozen=True)
class RunPlan:
    """Costs of a run of a model. `memory` is that of the rank that holds most."""

    run: Run
    model: str
    threads: int
    costs: CostModel
    memory: MemoryLines


@dataclass(frozen=True)
class DryRunResult:
    """Measurements of a dry run as a rank of a silo of one size.

    `loads` are those of all such silos, by silo. `meeting` are the bytes that a site of a federation brings and gets.
    """

    run: Run
    model: str
    stage_times: StageTimes
    loads: dict[int, SiloLoad]
    traffic: Traffic
    memory: MemoryLines
    meeting: tuple[int, int] | None


class Planner:
    """One of the workers that measure, for a run in their own world or in another one."""

    def __init__(self, config: Config, options: PlanOptions, peers: Peers):
        self.config, self.options, self.peers = config, options, peers
        self.is_federated = config.site.is_federated or config.site.is_simulation
        self.is_remote = is_remote_run(options, config.launch, peers.environment.launched_by == "launcher")

    def plan(self) -> RunPlan:
        """Measure. All ranks must call it; the plan is complete on rank 0.

        Raises:
            ValueError: bad input on any rank. It is raised on all of them.
        """
        config, environment = self.config, self.peers.environment
        threads = configure_torch(config, environment)
        here = self.peers.all_gather("nodes", lambda: environment.node)
        sizes = silo_sizes(config.silos, remote_nodes(config.launch, self.options.ranks) if self.is_remote else here)
        check_links(self.options, sizes, self.is_remote, environment.world_size)
        alone = replace(environment, rank=0, world_size=1, host=None)
        with distributed(1, alone, device=config.launch.device, backend=config.launch.backend) as one:
            results = {size: self._dry_run(size, sizes, one.device) for size in dict.fromkeys(sizes)}
        largest = max(results.values(), key=lambda result: sum(result.memory.values()))
        links, averaging = self._measure_peers(sizes, results)
        intra_silo, inter_silo = self._link_speeds(sizes, links)
        costs = CostModel(
            loads=tuple(results[size].loads[silo] for silo, size in enumerate(sizes)),
            stage_times={size: result.stage_times for size, result in results.items()},
            traffic=largest.traffic,
            intra_silo=intra_silo,
            inter_silo=inter_silo,
            rounds=largest.run.rounds,
            averaging=averaging,
            overlap=largest.run.algorithm.overlap_steps,
            star=self._star(largest, inter_silo),
        )
        return RunPlan(largest.run, largest.model, threads, costs, largest.memory)

    def _dry_run(self, size: int, sizes: tuple[int, ...], device: torch.device) -> DryRunResult:
        """Measure rounds of the first silo of this size."""
        topology = leader_topology(sizes.index(size), sizes, device)
        dry_run = self.peers.on_all_ranks(f"dry run of {size}", lambda: DryRun(build(self.config, topology)))
        rounds = [asdict(times) for times in dry_run.stage_times(SECONDS)]
        ranks = self.peers.all_gather(f"stage times of {size}", lambda: rounds)
        times = slowest_stage_times([StageTimes(**times) for times in rounds] for rounds in ranks)
        if self.options.seconds_per_step:
            times = replace(times, step=self.options.seconds_per_step)
        loads = {silo: dry_run.load(silo) for silo, replicas in enumerate(sizes) if replicas == size}
        meeting = dry_run.meeting() if self.is_federated else None
        return DryRunResult(dry_run.run, dry_run.model, times, loads, dry_run.traffic(), dry_run.memory(), meeting)

    def _star(self, result: DryRunResult, inter_silo: LinkSpeed | None) -> Star | None:
        """Return the links of a federation; None if the run is none."""
        options = self.options
        if result.meeting is None:
            return None
        link = inter_silo or LinkSpeed(options.bandwidth or 0.0, 0.0, is_measured=False)
        if options.latency:
            link = replace(link, latency=2 * options.latency)
        return Star(len(self.config.site.members) or 1, *result.meeting, link)

    def _link_speeds(self, sizes: tuple[int, ...], measured: list[Link]) -> tuple[LinkSpeed | None, LinkSpeed | None]:
        """Return the links inside silos and between them, as given, else as measured.

        None for a link that the run does not use.
        """
        options, messages = self.options, 2 * (len(sizes) - 1)  # one after another, in a ring all-reduce
        links = {link.name: LinkSpeed(link.bandwidth, link.latency, is_measured=True) for link in measured}
        intra_silo, inter_silo = links.get("inside silos"), links.get("between silos")
        if options.bandwidth_inside:
            intra_silo = LinkSpeed(options.bandwidth_inside, 0.0, is_measured=False)
        if options.bandwidth:
            inter_silo = LinkSpeed(options.bandwidth, 0.0, is_measured=False)
        if inter_silo and options.latency:
            inter_silo = replace(inter_silo, latency=messages * options.latency)
        return (intra_silo if max(sizes) > 1 else None), (inter_silo if len(sizes) > 1 else None)

    def _measure_peers(
        self, sizes: tuple[int, ...], results: dict[int, DryRunResult]
    ) -> tuple[list[Link], dict[int, float]]:
        """Measure links that are not given, and averaging of gradients by size of silo.

        The ranks here form a single silo if the run is elsewhere.
        """
        needs_intra_silo = max(sizes) > 1 and not self.options.bandwidth_inside
        if not needs_intra_silo and (len(sizes) == 1 or self.options.bandwidth):
            return [], {}
        silos = 1 if self.is_remote else self.config.silos
        launch, peers = self.config.launch, self.peers
        limits = (COLLECTIVE_TIMEOUT_SECONDS, COLLECTIVE_TIMEOUT_SECONDS, launch.inter_silo_backend)
        stuck = f"rank {peers.rank}: the links between the ranks are stuck after {LINK_TIMEOUT_SECONDS} s"
        world = distributed(silos, peers.environment, peers.store, launch.device, *limits, backend=launch.backend)
        with ExitStack() as stack:
            with watchdog(LINK_TIMEOUT_SECONDS, stuck):
                topology = stack.enter_context(world)
                links = measure_links(topology, topology)
            is_timed = needs_intra_silo and topology.silo_sizes == sizes and not self.options.seconds_per_step
            return links, self._averaging(topology, results) if is_timed else {}

    def _averaging(self, topology: Topology, results: dict[int, DryRunResult]) -> dict[int, float]:
        """Measure averaging: how much longer a step of a whole silo is than of a rank.

        Returns seconds by size of silo.
        """
        seconds = measure_step_seconds(results[topology.num_replicas].run, topology, SECONDS)
        steps = self.peers.all_gather("seconds of a step", lambda: (topology.num_replicas, seconds))
        slowest = {size: max(took for replicas, took in steps if replicas == size) for size in results if size > 1}
        return {size: max(took - results[size].stage_times.step, 0.0) for size, took in slowest.items()}
