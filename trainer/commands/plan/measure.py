"""The measuring: every worker here plays its part of a round, all at the same time, and then they try the links."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from trainer.commands.plan.cost_model import (
    CompressionCost,
    CostModel,
    LinkSpeed,
    SiloLoad,
    StageTimes,
    Traffic,
    slowest_stage_times,
)
from trainer.commands.plan.ddp_step import measure_step_seconds
from trainer.commands.plan.dry_run import DryRun
from trainer.commands.plan.memory import MemoryLines
from trainer.commands.plan.options import PlanOptions
from trainer.commands.plan.target_world import check_links, is_remote_run, leader_topology, remote_nodes
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.watchdog import watchdog
from trainer.commands.train.torch_settings import configure_torch
from trainer.config.build import build
from trainer.config.schema import Config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.topology import Topology, broadcast_via_store, distributed, silo_sizes
from trainer.loop.run import Run

T = TypeVar("T")

SECONDS = 3.0  # of playing
LINK_TIMEOUT_SECONDS = 300
COLLECTIVE_TIMEOUT_SECONDS = 60  # for one collective


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost. memory is that of the rank that holds most."""

    run: Run
    threads: int
    costs: CostModel
    memory: MemoryLines


@dataclass(frozen=True)
class DryRunResult:
    """What the rehearsal of a silo of one size has shown; loads by silo."""

    run: Run
    stage_times: StageTimes
    loads: dict[int, SiloLoad]
    traffic: Traffic
    compression_costs: dict[str, CompressionCost]
    memory: MemoryLines


@dataclass(frozen=True)
class PeerMeasurements:
    """What ranks have found out together: their links; seconds of averaging a step's gradients, by a silo's size."""

    links: list[Link]
    averaging: dict[int, float]


class Planner:
    """One worker of several, which look around for a run of their own world or of another."""

    def __init__(self, config: Config, options: PlanOptions, environment: ClusterEnvironment, store: Any):
        self.config, self.options, self.environment, self.store = config, options, environment, store
        self.is_remote = is_remote_run(options, config.launch, environment.launched_by == "launcher")
        self.threads = configure_torch(config, environment)

    def plan(self) -> RunPlan:
        """The plan, whole on rank 0. Raises ValueError, on all ranks, for bad input on any."""
        sizes = silo_sizes(self.config.silos, self._nodes())
        check_links(self.options, sizes, self.is_remote, self.environment.world_size)
        alone = replace(self.environment, rank=0, world_size=1, host=None)
        with distributed(1, alone, device=self.config.launch.device, backend=self.config.launch.backend) as one:
            played = {size: self._dry_run(size, sizes, one.device) for size in dict.fromkeys(sizes)}
        loads = tuple(played[size].loads[silo] for silo, size in enumerate(sizes))
        paces = {size: each.stage_times for size, each in played.items()}
        most = max(played.values(), key=lambda each: sum(each.memory.values()))
        run, peers = most.run, self._measure_peers(sizes, played)
        inside, between = self._link_speeds(sizes, peers.links)
        costs = CostModel(
            loads=loads,
            stage_times=paces,
            traffic=most.traffic,
            intra_silo=inside,
            inter_silo=between,
            rounds=run.rounds,
            averaging=peers.averaging,
            uplink=run.update_compression.name if most.compression_costs else "",
            compression_costs=most.compression_costs,
            overlap=run.algorithm.overlap_steps,
            can_overlap=run.algorithm.can_overlap,
        )
        return RunPlan(run, self.threads, costs, most.memory)

    def _nodes(self) -> list[int]:
        """The node of each rank of the run."""
        if self.is_remote:
            return remote_nodes(self.options, self.config.launch)
        return self._gather("nodes", self.environment.node)

    def _dry_run(self, size: int, sizes: tuple[int, ...], device: torch.device) -> DryRunResult:
        """What the first silo of this size does."""
        place = leader_topology(sizes.index(size), sizes, device)
        rehearsal = self._on_all_ranks(f"rehearsal of {size}", lambda: DryRun(build(self.config, place)))
        own = [asdict(pace) for pace in rehearsal.stage_times(SECONDS)]
        pace = slowest_stage_times(
            [StageTimes(**told) for told in rank] for rank in self._gather(f"paces of {size}", own)
        )
        if self.options.seconds_per_step:
            pace = replace(pace, step=self.options.seconds_per_step)
        loads = {silo: rehearsal.load(silo) for silo, replicas in enumerate(sizes) if replicas == size}
        return DryRunResult(
            rehearsal.run, pace, loads, rehearsal.traffic(), rehearsal.compression_costs(), rehearsal.memory()
        )

    def _link_speeds(self, sizes: tuple[int, ...], measured: list[Link]) -> tuple[LinkSpeed | None, LinkSpeed | None]:
        """The links inside the silos and between them."""
        wishes, messages = self.options, 2 * (len(sizes) - 1)  # in a row, of a sum around a ring
        inside = between = None
        if wishes.bandwidth_inside:
            inside = LinkSpeed(wishes.bandwidth_inside, 0.0, is_measured=False)
        if wishes.bandwidth:
            between = LinkSpeed(wishes.bandwidth, messages * (wishes.latency or 0.0), is_measured=False)
        links = {link.name: LinkSpeed(link.bandwidth, link.latency, is_measured=True) for link in measured}
        inside = inside or links.get("inside silos")
        between = between or links.get("between silos")
        if between and wishes.latency:
            between = replace(between, latency=messages * wishes.latency)
        return (inside if max(sizes) > 1 else None), (between if len(sizes) > 1 else None)

    def _measure_peers(self, sizes: tuple[int, ...], played: dict[int, DryRunResult]) -> PeerMeasurements:
        """What this world shows together, of what is not told; all its ranks are one silo if the run is elsewhere."""
        asks_inside = max(sizes) > 1 and not self.options.bandwidth_inside
        if not asks_inside and (len(sizes) == 1 or self.options.bandwidth):
            return PeerMeasurements([], {})
        silos = 1 if self.is_remote else self.config.silos
        launch = self.config.launch
        limits = (COLLECTIVE_TIMEOUT_SECONDS, COLLECTIVE_TIMEOUT_SECONDS, launch.inter_silo_backend)
        stuck = f"rank {self.environment.rank}: nothing passes between the ranks in {LINK_TIMEOUT_SECONDS} s"
        world = distributed(silos, self.environment, self.store, launch.device, *limits, backend=launch.backend)
        with ExitStack() as stack:
            with watchdog(LINK_TIMEOUT_SECONDS, stuck):
                topology = stack.enter_context(world)
                links = measure_links(topology, topology)
            is_here = topology.silo_sizes == sizes and not self.options.seconds_per_step
            return PeerMeasurements(links, self._averaging(topology, played) if asks_inside and is_here else {})

    def _averaging(self, topology: Topology, played: dict[int, DryRunResult]) -> dict[int, float]:
        """By how much a step of a whole silo is longer than one alone, by the size of silos of several."""
        own = measure_step_seconds(played[topology.num_replicas].run, topology, SECONDS)
        steps = self._gather("steps together", (topology.num_replicas, own))
        slowest = {size: max(took for replicas, took in steps if replicas == size) for size in played if size > 1}
        return {size: max(took - played[size].stage_times.step, 0.0) for size, took in slowest.items()}

    def _gather(self, name: str, value: Any) -> list[Any]:
        """The values of all ranks, on all of them."""
        self.store.set(f"{name}/{self.environment.rank}", json.dumps(value))

        def listed() -> str:
            return json.dumps(
                [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.environment.world_size)]
            )

        return json.loads(broadcast_via_store(self.store, name, self.environment, listed))

    def _on_all_ranks(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, on all ranks at once; ValueError on all if it failed on any."""
        made, fault = None, ""
        try:
            made = make()
        except ValueError as error:
            fault = str(error)
        if errors := [text for text in self._gather(name, fault) if text]:
            raise ValueError("\n".join(dict.fromkeys(errors)))
        return made  # pyright: ignore[reportReturnType] (without a fault it was made)
