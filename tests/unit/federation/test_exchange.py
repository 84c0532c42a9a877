"""K sites are one silo with K clients: the coordinator ends with the same bits."""

from __future__ import annotations

import threading
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.laws.cases import SIZES, case_run
from trainer.distributed.topology import distributed
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.messages import MessageReader, read_message
from trainer.federation.registry import Registry
from trainer.federation.spool import Spool
from trainer.loggers import Logger
from trainer.loop.checkpointing import make_checkpointer
from trainer.loop.fit import fit

ROUNDS = 3
BIT_EQUAL = ["fedavg", "fedprox", "fedavg_adam", "fedavg_momentum", "diloco", "median", "krum"]
CLOSE = ["scaffold", "fednova"]


class Hall:
    """The meetings of sites that are threads of one process."""

    def __init__(self, registry, name):
        self.registry, self.name = registry, name

    def meet(self, message):
        key = message.header["key"]
        max_bytes = self.registry.wait_open(self.name, key, 0, lambda: True)
        if max_bytes is not None:
            with self.registry.spool.receiving(key, self.name) as file:
                reader = MessageReader(max_bytes, file)
                for part in message.parts():
                    reader.add(part)
                reader.finish()
            self.registry.bring(self.name, key)
        return read_message(self.registry.result(self.name, key, lambda: True))

    def newest(self, rounds):
        state = self.registry.newest(self.name, rounds, lambda: True)
        return state and read_message(state)


class Hosts:
    """The gatherings of the coordinator of such sites."""

    def __init__(self, registry):
        self.gather, self.publish = registry.gather, registry.publish


def as_member(run, silo, silos, initial):
    topology = replace(run.topology, silo=silo, silo_sizes=(1,) * silos)
    # The generators of torch are those of all threads.
    return replace(
        run,
        model=lambda: deepcopy(initial),
        topology=topology,
        clients=replace(run.clients, homes=tuple(range(len(SIZES)))),
    )


def over_sites(name, folder):
    """Return the parameters and the metrics of the coordinator, with a site for each client."""
    names = [f"site-{client}" for client in range(len(SIZES))]
    registry, results, errors = Registry(Spool(folder), names), {}, []
    with distributed(device="cpu") as topology:
        initial = case_run(topology, name, {"rounds": ROUNDS}).make_model()

        def work(silo, make_exchange):
            try:
                run = as_member(case_run(topology, name, {"rounds": ROUNDS}), silo, len(SIZES) + 1, initial)
                states = []
                result = fit(run, make_exchange=make_exchange, on_start=states.append)
                results[silo] = states[0].algorithm.global_state()["parameters"].clone(), result.metrics
            except BaseException as error:
                errors.append(error)
                raise

        makers = [partial(SiteExchange, Hall(registry, each), each) for each in names]
        makers.append(partial(CoordinatorExchange, Hosts(registry)))
        threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(makers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            if errors:
                break
        assert not errors and len(results) == len(makers), errors
    return results


def in_one_silo(name):
    with distributed(device="cpu") as topology:
        states = []
        result = fit(case_run(topology, name, {"rounds": ROUNDS}), on_start=states.append)
        return states[0].algorithm.global_state()["parameters"].clone(), result.metrics


@pytest.mark.parametrize("name", [*BIT_EQUAL, *CLOSE])
def test_sites_are_clients_of_one_silo(name, tmp_path):
    results = over_sites(name, tmp_path)
    expected, metrics = in_one_silo(name)
    coordinator, _ = results[len(SIZES)]
    for parameters, _ in results.values():
        assert torch.equal(parameters, coordinator)
    if name in BIT_EQUAL:
        assert torch.equal(coordinator, expected)
    torch.testing.assert_close(coordinator, expected, rtol=1e-6, atol=1e-6)
    for name, value in metrics.items():
        if name.startswith(("test/", "train/", "client/", "round/")):
            assert results[0][1][name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


class Waiter(Logger):
    """Ends a round of a member only when something has happened."""

    def __init__(self, waits, signals):
        self.waits, self.signals, self.counts = waits, signals, {}

    def log_round(self, metrics):
        self.counts[metrics["round"]] = metrics["clients/trained"]
        if metrics["round"] in self.signals:
            self.signals[metrics["round"]].set()
        if metrics["round"] in self.waits:
            assert self.waits[metrics["round"]].wait(20)


def test_a_site_that_missed_rounds_continues_with_the_others(tmp_path):
    names, rounds = [f"site-{client}" for client in range(len(SIZES))], 8
    last, coordinator = len(SIZES) - 1, len(SIZES)
    registry = Registry(Spool(tmp_path / "meetings"), names, grace_seconds=0.01, min_members=1)
    left, back = threading.Event(), threading.Event()
    states, metrics = {}, {}
    log = Waiter({5: back}, {5: left})
    with distributed(device="cpu") as topology:
        initial = case_run(topology, "scaffold", {"rounds": rounds}).make_model()

        def part(silo, make_exchange, **choices):
            run = as_member(case_run(topology, "scaffold", {"rounds": rounds}), silo, len(SIZES) + 1, initial)
            result = fit(
                run, make_exchange=make_exchange, on_start=lambda state: states.update({silo: state}), **choices
            )
            metrics[silo] = result.metrics

        def site(silo, **choices):
            registry.enter(names[silo], "launch")
            part(silo, partial(SiteExchange, Hall(registry, names[silo]), names[silo]), **choices)

        def coming_and_going():
            checkpoints = make_checkpointer(states[0].run, tmp_path / "checkpoints")
            site(last, until=2, checkpointer=checkpoints)
            registry.leave(names[last], "launch")
            assert left.wait(20)
            registry.enter(names[last], "launch")
            back.set()
            site(last, checkpointer=checkpoints, resume_point=checkpoints.latest())

        part_of_each = [
            partial(site, 0, loggers=[log]),
            *(partial(site, silo) for silo in range(1, last)),
            partial(part, coordinator, partial(CoordinatorExchange, Hosts(registry))),
        ]
        threads = [threading.Thread(target=each, daemon=True) for each in part_of_each]
        for thread in threads:
            thread.start()
        while 0 not in states:
            time.sleep(0.01)
        threads.append(threading.Thread(target=coming_and_going, daemon=True))
        threads[-1].start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert [log.counts[index + 1] for index in range(rounds)] == [last + 1] * 2 + [last] * 3 + [last + 1] * 3
    for silo in range(coordinator):
        assert states[silo].progress.rounds == rounds
        assert torch.equal(states[silo].participations, states[coordinator].participations)
        for name, vector in states[coordinator].algorithm.global_state().items():
            assert torch.equal(states[silo].algorithm.global_state()[name], vector), name
        assert metrics[silo]["test/loss"] == metrics[coordinator]["test/loss"]
