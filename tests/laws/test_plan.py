"""The steps, bytes and memory that one rank estimates alone are those that real ranks report."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch

from tests.laws.cases import CASES, case_run, silos_of, train
from tests.support.runs import average, make_model, make_run
from trainer.algorithms import FedAvg
from trainer.commands.plan.cost_model import SiloLoad, Traffic
from trainer.commands.plan.dry_run import DryRun, measure_step_seconds
from trainer.commands.plan.memory import MemoryLines
from trainer.commands.plan.target_world import leader_topology
from trainer.distributed.gradients import HalfPrecisionReducer, PowerSGDReducer
from trainer.distributed.silos import silo_sizes
from trainer.distributed.topology import distributed
from trainer.loop.options import RoundOptions
from trainer.loop.run import GradientReducerFactory

OTHER_SILOS = [(name, silos) for silos in ([1, 1], [3, 1]) for name in ("fedavg", "scaffold", "diloco", "krum", "int8")]
CPU = torch.device("cpu")
MLP_PARAMETERS = 784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10

adamw = partial(torch.optim.AdamW, lr=0.01)
nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


def estimated(name: str, sizes: tuple[int, ...], choices: dict[str, Any]) -> tuple[Traffic, list[SiloLoad]]:
    """Return the traffic and loads of a round, from a dry run for each size of silo."""
    with distributed(1):
        runs = {size: DryRun(case_run(leader_topology(sizes.index(size), sizes, CPU), name, choices)) for size in sizes}
        traffic = {run.traffic() for run in runs.values()}
        loads = [runs[size].load(silo) for silo, size in enumerate(sizes)]
    assert len(traffic) == 1
    return traffic.pop(), loads


@pytest.mark.parametrize(("name", "silos"), [*((name, [2, 2]) for name in CASES), *OTHER_SILOS], ids=str)
@pytest.mark.quick_rows(6)
def test_bytes_and_steps_are_those_that_a_run_reports(ranks, name: str, silos: list[int]):
    """The sums over all silos in a run of two rounds."""
    choices = {"round": RoundOptions(epochs=2)} if name not in ("fedsgd", "scaffold") else {}
    (first, *_), *_ = [one.rounds for one in ranks(4 if sum(silos) > 2 else 2).run(train, name, silos, choices)]
    sizes = silo_sizes(silos_of(name, silos), [0] * sum(silos))
    (traffic, loads), *_ = ranks(1).run(estimated, name, sizes, choices)
    assert traffic.inter_silo == first["bytes_between_silos"]
    assert sum(load.steps for load in loads) == first["round/steps"]
    assert sum(load.examples for load in loads) == first["round/examples"]


def gradient_bytes(reducer: GradientReducerFactory) -> int:
    with distributed(1):
        run = make_run(leader_topology(0, [2], CPU), [16], gradient_compression=reducer)
        return DryRun(run).traffic().gradients


def test_compressed_gradients_can_be_planned_without_the_other_replicas(ranks):
    """Half of 4 bytes for each number; thin matrices of 4 columns, and vectors as they are."""
    assert ranks(1).run(gradient_bytes, HalfPrecisionReducer) == [2 * MLP_PARAMETERS]
    thin = 4 * (784 + 32) + 4 * (32 + 32) + 32 * 10
    assert ranks(1).run(gradient_bytes, partial(PowerSGDReducer, rank=4)) == [4 * (thin + 32 + 32 + 10)]


def held(sizes: list[int], clients: list[int], slots: dict[str, Any], optimizer: Any) -> MemoryLines:
    """Return the memory of the first rank."""
    with distributed(1):
        topology = leader_topology(0, sizes, CPU)
        return DryRun(make_run(topology, clients, algorithm=FedAvg(**slots), optimizer=optimizer)).memory()


def test_memory_of_diloco(ranks):
    """Two silos of two: AdamW keeps two numbers for each parameter and client, Nesterov one for each of its shard."""
    slots = {"server": nesterov, "weighting": "equal", "client_optimizer_state": "keep"}
    (lines,) = ranks(1).run(held, [2, 2], [16, 16, 16, 16], slots, adamw)
    vector = lines["global parameters"]
    assert vector == pytest.approx(4 * MLP_PARAMETERS, rel=0.01), "with its padding"
    assert lines["parameters and buffers"] == lines["sums of the silo's clients"] == vector
    assert lines["gradients"] == 4 * MLP_PARAMETERS
    assert lines["client optimizer's state"] == pytest.approx(8 * MLP_PARAMETERS, rel=0.01)
    assert lines["states kept for clients"] == pytest.approx(2 * 8 * MLP_PARAMETERS, rel=0.01)
    assert lines["server optimizer's state, of its shard"] == vector // 2


def test_memory_of_fedavg(ranks):
    """One client in each silo: no sums, and no states are kept."""
    (lines,) = ranks(1).run(held, [1, 1], [16, 16], {"server": average}, partial(torch.optim.SGD, lr=0.1))
    expected = {"parameters and buffers", "gradients", "global parameters"}
    assert expected <= set(lines) and not set(lines) & {"sums of the silo's clients", "states kept for clients"}


SLEEP = 0.02  # seconds


def step_together(silos: list[int], slow: int) -> float:
    """Return this rank's seconds of a step, in most of which one rank sleeps."""
    with distributed(silos) as topology:
        module = make_model("mlp")
        if topology.rank == slow:
            module.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))
        run = make_run(topology, [16] * topology.num_silos, algorithm=FedAvg(server=average), module=module)
        return measure_step_seconds(run, topology, seconds=0.05)


def test_a_step_takes_each_replica_as_long_as_the_slowest_of_its_silo(ranks):
    took = ranks(4).run(step_together, [3, 1], 1)
    assert all(seconds >= SLEEP for seconds in took[:3])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.quick_rows(8)
def test_steps_of_whole_silos_can_be_timed_for_every_algorithm(ranks, name: str):
    assert all(seconds > 0 for seconds in ranks(4).run(timed, name))


def timed(name: str) -> float:
    with distributed(silos_of(name, [2, 2])) as topology:
        return measure_step_seconds(case_run(topology, name, {}), topology, seconds=0.05)
