"""K sites are one silo with K clients: the coordinator ends with the same bits."""

from __future__ import annotations

import math
import threading
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.laws.cases import SIZES, case_run
from trainer.distributed.topology import distributed
from trainer.federation.disclosure import Disclosure
from trainer.federation.exchange import CoordinatorExchange, SiteExchange
from trainer.federation.messages import Message, MessageReader, read_message, read_parts
from trainer.federation.registry import Registry
from trainer.federation.spool import Spool
from trainer.loggers import Logger
from trainer.loop.checkpointing import make_checkpointer
from trainer.loop.fit import fit

ROUNDS = 3


class Hall:
    """The meetings of sites that are threads of one process."""

    def __init__(self, registry, name, spoil=None):
        self.registry, self.name, self.spoil = registry, name, spoil

    def meet(self, message, expected):
        message = Disclosure().reduce(message)
        if self.spoil:
            message = self.spoil(message)
        key = message.header["key"]
        limit = self.registry.wait_open(self.name, key, 0, lambda: True)
        if limit:
            with self.registry.spool.receiving(key, self.name) as file:
                reader = MessageReader(limit, file)
                for part in message.parts():
                    reader.add(part)
                reader.finish()
            self.registry.bring(self.name, key)
        answer = MessageReader(expected)
        for part in read_parts(self.registry.result(self.name, key, lambda: True)):
            answer.add(part)
        return answer.finish()

    def newest(self, rounds, limit):
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


def over_sites(name, folder, spoil=None):
    """Return the parameters and the metrics of all members, with a site for each client; `spoil` changes messages."""
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

        spoils = {names[1]: spoil}
        makers = [partial(SiteExchange, Hall(registry, each, spoils.get(each)), each) for each in names]
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


def test_sites_are_clients_of_one_silo(tmp_path):
    """Through files, at the same time; tests/laws/test_sites.py has the law of all algorithms."""
    results = over_sites("fedavg", tmp_path)
    expected, metrics = in_one_silo("fedavg")
    coordinator, _ = results[len(SIZES)]
    for parameters, _ in results.values():
        assert torch.equal(parameters, coordinator)
    assert torch.equal(coordinator, expected)
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


def with_sums(**sums):
    return lambda message: Message({**message.header, "sums": {**message.header["sums"], **sums}}, message.tensors)


def with_tensor(name, place, number):
    def spoil(message):
        tensor = message.tensors[name].clone()
        tensor.view(-1)[place] = number
        return Message(message.header, {**message.tensors, name: tensor})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_sums(weight=math.nan), "its weight is nan"),
        (with_sums(weight=-3.0), "its weight is -3"),
        (with_sums(trained_weight=-1.0), "its trained_weight is -1"),
        (with_sums(learning_rates=math.inf), "its learning_rates is inf"),
        (with_tensor("vector/delta", 2, math.inf), "its delta is not finite"),
        (with_tensor("vector/delta", -1, math.nan), "its delta is not finite"),
        (with_sums(left_out=1.0), "the update of its client is not finite"),
    ],
)
def test_broken_numbers_of_a_site_are_left_out_and_named(spoil, reason, tmp_path, capfd):
    key = f"rounds/{ROUNDS - 1}/training"
    results = over_sites(
        "fedavg", tmp_path, lambda message: spoil(message) if message.header["key"] == key else message
    )
    for parameters, metrics in results.values():
        assert parameters.isfinite().all()
        assert metrics["clients/nonfinite"] == 1
        assert math.isfinite(metrics["train/loss"])
    assert capfd.readouterr().err.count(f"site-1 is left out of round {ROUNDS}: {reason}\n") == 1


def test_figures_may_be_infinite(tmp_path, capfd):
    spoil = with_sums(loss_sum=math.inf)
    results = over_sites("fedavg", tmp_path, lambda each: spoil(each) if "training" in each.header["key"] else each)
    assert results[0][1]["train/loss"] == math.inf and results[0][1]["clients/nonfinite"] == 0
    assert "left out" not in capfd.readouterr().err
