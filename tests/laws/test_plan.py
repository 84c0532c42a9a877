"""What one rank, playing alone, foretells of a round is what the real ranks report of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.laws.cases import CASES, case_run, robust, silos_of, train
from tests.support.runs import average, make_run
from trainer.algorithms import Algorithm, FedAvg, Median, Sync
from trainer.commands.plan.cost_model import CompressionCost, SiloLoad, Traffic
from trainer.commands.plan.ddp_step import measure_step_seconds
from trainer.commands.plan.dry_run import DryRun
from trainer.commands.plan.memory import MemoryLines
from trainer.commands.plan.target_world import leader_topology
from trainer.distributed.gradients import GradientReducer, HalfPrecisionReducer, PowerSGDReducer
from trainer.distributed.topology import distributed, silo_sizes
from trainer.loop.run import RoundLength

OTHER_SILOS = [(name, silos) for silos in ([1, 1], [3, 1]) for name in ("fedavg", "scaffold", "diloco", "krum", "int8")]
CPU = torch.device("cpu")
MLP_PARAMETERS = 784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10

adamw = partial(torch.optim.AdamW, lr=0.01)
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def foretold(name: str, sizes: tuple[int, ...], choices: dict[str, Any]) -> tuple[Traffic, list[SiloLoad]]:
    """What the leaders of the silos say of a round, each of the silos of its size."""
    with distributed(1):
        played = {
            size: DryRun(case_run(leader_topology(sizes.index(size), sizes, CPU), name, choices)) for size in sizes
        }
        traffic = {one.traffic() for one in played.values()}
        loads = [played[size].load(silo) for silo, size in enumerate(sizes)]
    assert len(traffic) == 1
    return traffic.pop(), loads


@pytest.mark.parametrize(("name", "silos"), [*((name, [2, 2]) for name in CASES), *OTHER_SILOS], ids=str)
def test_bytes_and_steps_are_those_that_are_reported(ranks, name: str, silos: list[int]):
    """Of all silos together, in a run of two rounds."""
    choices = {"length": RoundLength(epochs=2)} if name not in ("fedsgd", "scaffold") else {}
    (first, *_), *_ = [one.rounds for one in ranks(4 if sum(silos) > 2 else 2).run(train, name, silos, choices)]
    sizes = silo_sizes(silos_of(name, silos), [0] * sum(silos))
    (traffic, loads), *_ = ranks(1).run(foretold, name, sizes, choices)
    assert traffic.between == first["bytes_between_silos"]
    assert sum(load.steps for load in loads) == first["round/steps"]
    assert sum(load.examples for load in loads) == first["round/examples"]


def foretold_with(reducer: GradientReducer) -> int:
    with distributed(1):
        return DryRun(make_run(leader_topology(0, [2], CPU), [16], gradient_compression=reducer)).traffic().gradients


def test_gradients_in_few_bytes_can_be_planned_without_their_replicas(ranks):
    """Half of 4 bytes a number; thin matrices of 4 columns, and vectors as they are."""
    assert ranks(1).run(foretold_with, HalfPrecisionReducer()) == [2 * MLP_PARAMETERS]
    thin = 4 * (784 + 32) + 4 * (32 + 32) + 32 * 10
    assert ranks(1).run(foretold_with, PowerSGDReducer(rank=4)) == [4 * (thin + 32 + 32 + 10)]


def held(sizes: list[int], clients: list[int], slots: dict[str, Any], optimizer: Any) -> MemoryLines:
    """The memory of the first rank."""
    with distributed(1):
        topology = leader_topology(0, sizes, CPU)
        return DryRun(make_run(topology, clients, algorithm=FedAvg(**slots), optimizer=optimizer)).memory()


def test_memory_of_diloco(ranks):
    """Two silos of two: AdamW keeps two numbers a parameter, of both clients of the silo; Nesterov one, of its half."""
    slots = {"server": nesterov, "weighting": "equal", "client_optimizer_state": "keep"}
    (lines,) = ranks(1).run(held, [2, 2], [16, 16, 16, 16], slots, adamw)
    vector = lines["global parameters"]
    assert vector == pytest.approx(4 * MLP_PARAMETERS, rel=0.01), "with its padding"
    assert lines["parameters and buffers"] == lines["sums of the silo's clients"] == vector
    assert lines["gradients"] == 4 * MLP_PARAMETERS
    assert lines["inner optimizer's state"] == pytest.approx(8 * MLP_PARAMETERS, rel=0.01)
    assert lines["states kept for clients"] == pytest.approx(2 * 8 * MLP_PARAMETERS, rel=0.01)
    assert lines["server optimizer's state, of its slice"] == vector // 2


def test_memory_of_fedavg(ranks):
    """One client a silo: no sums, and nothing is kept."""
    (lines,) = ranks(1).run(held, [1, 1], [16, 16], {"server": average}, partial(torch.optim.SGD, lr=0.1))
    told = {"parameters and buffers", "gradients", "global parameters"}
    assert told <= set(lines) and not set(lines) & {"sums of the silo's clients", "states kept for clients"}


def offered(sizes: list[int], algorithm: Callable[[], Algorithm]) -> dict[str, CompressionCost]:
    """What each uplink makes of a round of a small model."""
    with distributed(1):
        run = make_run(leader_topology(0, sizes, CPU), [16] * len(sizes), algorithm=algorithm())
        return DryRun(run).compression_costs()


@pytest.mark.parametrize("silos", [2, 4])
def test_the_bytes_of_other_uplinks_are_those_of_their_codecs(ranks, silos: int):
    """Two silos send each other all they have, four send shares and then sums: a half, a fourth with its scales."""
    (found,) = ranks(1).run(offered, [1] * silos, partial(FedAvg, average))
    assert list(found) == ["fp32", "bf16", "int8", "int4", "topk"]
    plain = found["fp32"].between
    assert found["bf16"].between == pytest.approx(plain / 2, rel=0.01)
    assert plain / 4 < found["int8"].between < plain / 3.8
    assert all((packing.seconds > 0) == (name != "fp32") for name, packing in found.items())


def test_what_cannot_be_packed_is_not_offered(ranks):
    assert ranks(1).run(offered, [1, 1], robust(Median())) == [{}]
    assert ranks(1).run(offered, [1], Sync) == [{}]


SLEEP = 0.02  # seconds


def step_together(silos: list[int], slow: int) -> float:
    """This rank's seconds of a step, of which one rank sleeps through the most."""
    with distributed(silos) as topology:
        run = make_run(topology, [16] * topology.num_silos, algorithm=FedAvg(average))
        if topology.rank == slow:
            run.module.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        return measure_step_seconds(run, topology, seconds=0.05)


def test_a_step_takes_every_replica_of_a_silo_as_long_as_its_slowest(ranks):
    took = ranks(4).run(step_together, [3, 1], 1)
    assert all(seconds >= SLEEP for seconds in took[:3])


@pytest.mark.parametrize("name", CASES)
def test_steps_of_whole_silos_can_be_timed_whatever_the_algorithm(ranks, name: str):
    assert all(seconds > 0 for seconds in ranks(4).run(timed, name))


def timed(name: str) -> float:
    with distributed(silos_of(name, [2, 2])) as topology:
        return measure_step_seconds(case_run(topology, name, {}), topology, seconds=0.05)
