"""K sites are one silo with K clients: the coordinator ends with the same bits."""

from __future__ import annotations

import threading
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
        return read_message(self.registry.result(key, lambda: True))

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
