"""The measuring: every worker here plays its part of a round, all at the same time, and then they try the links."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from trainer.commands.plan.cost_model import Costs, Line, Load, Pace, Packing, Traffic, pace_of
from trainer.commands.plan.ddp_step import seconds_of_step
from trainer.commands.plan.dry_run import Rehearsal
from trainer.commands.plan.memory import Lines
from trainer.commands.plan.options import Wishes
from trainer.commands.plan.target_world import check_links, is_elsewhere, leader_of, nodes_elsewhere
from trainer.commands.probe.link_bandwidth import Link, measure_links
from trainer.commands.probe.watchdog import deadline
from trainer.commands.train.torch_settings import set_up
from trainer.config.build import build
from trainer.config.schema import Config
from trainer.distributed.environment import Place
from trainer.distributed.topology import Topology, distributed, share, silo_sizes
from trainer.loop.run import Run

T = TypeVar("T")

SECONDS = 3.0  # of playing
SECONDS_FOR_LINKS = 300
SECONDS_TO_COLLECT = 60  # for one collective


@dataclass(frozen=True)
class Plan:
    """What a run will cost. memory is that of the rank that holds most."""

    run: Run
    threads: int
    costs: Costs
    memory: Lines


@dataclass(frozen=True)
class Played:
    """What the rehearsal of a silo of one size has shown; loads by silo."""

    run: Run
    pace: Pace
    loads: dict[int, Load]
    traffic: Traffic
    packings: dict[str, Packing]
    memory: Lines


@dataclass(frozen=True)
class Peers:
    """What ranks have found out together: their links; seconds of averaging a step's gradients, by a silo's size."""

    links: list[Link]
    averaging: dict[int, float]


class Measuring:
    """One worker of several, which look around for a run of their own world or of another."""

    def __init__(self, config: Config, wishes: Wishes, place: Place, store: Any):
        self.config, self.wishes, self.place, self.store = config, wishes, place, store
        self.elsewhere = is_elsewhere(wishes, config.launch, place.started_by == "launcher")
        self.threads = set_up(config, place)

    def plan(self) -> Plan:
        """The plan, whole on rank 0. Raises ValueError, on all ranks, for bad input on any."""
        sizes = silo_sizes(self.config.silos, self._nodes())
        check_links(self.wishes, sizes, self.elsewhere, self.place.world_size)
        alone = replace(self.place, rank=0, world_size=1, host=None)
        with distributed(1, alone, device=self.config.launch.device, backend=self.config.launch.backend) as one:
            played = {size: self._play(size, sizes, one.device) for size in dict.fromkeys(sizes)}
        loads = tuple(played[size].loads[silo] for silo, size in enumerate(sizes))
        paces = {size: each.pace for size, each in played.items()}
        most = max(played.values(), key=lambda each: sum(each.memory.values()))
        run, peers = most.run, self._peers(sizes, played)
        inside, between = self._lines(sizes, peers.links)
        costs = Costs(
            loads=loads,
            paces=paces,
            traffic=most.traffic,
            inside=inside,
            between=between,
            rounds=run.rounds,
            averaging=peers.averaging,
            uplink=run.update_compression.name if most.packings else "",
            packings=most.packings,
            overlap=run.algorithm.overlap_steps,
            can_overlap=run.algorithm.can_overlap,
        )
        return Plan(run, self.threads, costs, most.memory)

    def _nodes(self) -> list[int]:
        """The node of each rank of the run."""
        if self.elsewhere:
            return nodes_elsewhere(self.wishes, self.config.launch)
        return self._gather("nodes", self.place.node)

    def _play(self, size: int, sizes: tuple[int, ...], device: torch.device) -> Played:
        """What the first silo of this size does."""
        place = leader_of(sizes.index(size), sizes, device)
        rehearsal = self._together(f"rehearsal of {size}", lambda: Rehearsal(build(self.config, place)))
        own = [asdict(pace) for pace in rehearsal.paces(SECONDS)]
        pace = pace_of([Pace(**told) for told in rank] for rank in self._gather(f"paces of {size}", own))
        if self.wishes.seconds_per_step:
            pace = replace(pace, step=self.wishes.seconds_per_step)
        loads = {silo: rehearsal.load(silo) for silo, replicas in enumerate(sizes) if replicas == size}
        return Played(rehearsal.run, pace, loads, rehearsal.traffic(), rehearsal.packings(), rehearsal.memory())

    def _lines(self, sizes: tuple[int, ...], measured: list[Link]) -> tuple[Line | None, Line | None]:
        """The links inside the silos and between them."""
        wishes, messages = self.wishes, 2 * (len(sizes) - 1)  # in a row, of a sum around a ring
        inside = between = None
        if wishes.bandwidth_inside:
            inside = Line(wishes.bandwidth_inside, 0.0, is_measured=False)
        if wishes.bandwidth:
            between = Line(wishes.bandwidth, messages * (wishes.latency or 0.0), is_measured=False)
        links = {link.name: Line(link.bandwidth, link.latency, is_measured=True) for link in measured}
        inside = inside or links.get("inside silos")
        between = between or links.get("between silos")
        if between and wishes.latency:
            between = replace(between, latency=messages * wishes.latency)
        return (inside if max(sizes) > 1 else None), (between if len(sizes) > 1 else None)

    def _peers(self, sizes: tuple[int, ...], played: dict[int, Played]) -> Peers:
        """What this world shows together, of what is not told; all its ranks are one silo if the run is elsewhere."""
        asks_inside = max(sizes) > 1 and not self.wishes.bandwidth_inside
        if not asks_inside and (len(sizes) == 1 or self.wishes.bandwidth):
            return Peers([], {})
        silos = 1 if self.elsewhere else self.config.silos
        launch = self.config.launch
        limits = (SECONDS_TO_COLLECT, SECONDS_TO_COLLECT, launch.inter_silo_backend)
        stuck = f"rank {self.place.rank}: nothing passes between the ranks in {SECONDS_FOR_LINKS} s"
        world = distributed(silos, self.place, self.store, launch.device, *limits, backend=launch.backend)
        with ExitStack() as stack:
            with deadline(SECONDS_FOR_LINKS, stuck):
                topology = stack.enter_context(world)
                links = measure_links(topology, topology)
            is_here = topology.silo_sizes == sizes and not self.wishes.seconds_per_step
            return Peers(links, self._averaging(topology, played) if asks_inside and is_here else {})

    def _averaging(self, topology: Topology, played: dict[int, Played]) -> dict[int, float]:
        """By how much a step of a whole silo is longer than one alone, by the size of silos of several."""
        own = seconds_of_step(played[topology.num_replicas].run, topology, SECONDS)
        steps = self._gather("steps together", (topology.num_replicas, own))
        slowest = {size: max(took for replicas, took in steps if replicas == size) for size in played if size > 1}
        return {size: max(took - played[size].pace.step, 0.0) for size, took in slowest.items()}

    def _gather(self, name: str, value: Any) -> list[Any]:
        """The values of all ranks, on all of them."""
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))

        def listed() -> str:
            return json.dumps([json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.place.world_size)])

        return json.loads(share(self.store, name, self.place, listed))

    def _together(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, on all ranks at once; ValueError on all if it failed on any."""
        made, fault = None, ""
        try:
            made = make()
        except ValueError as error:
            fault = str(error)
        if faults := [text for text in self._gather(name, fault) if text]:
            raise ValueError("\n".join(dict.fromkeys(faults)))
        return made  # pyright: ignore[reportReturnType] (without a fault it was made)
