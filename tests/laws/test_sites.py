"""K sites are one silo with K clients: the same models, states of clients, states of the server, and figures."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli.command import named_choices
from tests.laws.cases import (
    CASES,
    SIZES,
    TEST_EXAMPLES,
    Only,
    Outcome,
    assert_close,
    assert_same,
    every_client,
    figures,
    scaffold,
    tiny_data,
    tiny_model,
)
from tests.laws.heterogeneity import DEADLINE, DONE, SLOW, STEPS, Planned, by_clock, slow_choices
from tests.laws.sites import Federation, as_member, at_silo, in_one_silo, options, over_sites
from tests.laws.test_batch_statistics import norm_choices
from tests.laws.test_cases import ROWS
from tests.laws.test_frozen import half_frozen
from tests.laws.test_stopping import held_out
from tests.support.runs import fedavg
from trainer.algorithms.round import Round
from trainer.data import DataSplits, ExampleWeights, TensorSource
from trainer.data.client_sampling.sampling import UniformSampler
from trainer.distributed.compression import Cast, Codec, Int4, Int8, TopK
from trainer.distributed.topology import distributed
from trainer.distributed.transport import decode_upload, make_upload
from trainer.federation.certificates import certify
from trainer.federation.link import COORDINATOR
from trainer.federation.membership import Coordinator
from trainer.loop.options import ClipOptions, RoundOptions
from trainer.loop.stopping import StopCriteria
from trainer.optim.schedules import Linear

COUNT = 5  # sites; krum needs as many
SMALL: dict[str, Any] = {"sizes": SIZES[:COUNT], "rounds": 3, "eval.batch_size": 1}
REFUSED = {name for name, case in CASES.items() if case.algorithm().needs_one_world}
COMPRESSED = {name for name, case in CASES.items() if "update_compression" in case.choices}
# SCAFFOLD: a site adds its change of c to 0, and the coordinator adds that to the others'; in one silo each is added by
# one fused operation, which rounds once. FedNova: the sum of the a_k is rounded by the site and by the coordinator.
CLOSE = {"scaffold", "fednova"}

FLOATS = {"module": tiny_model(), "data": tiny_data(sum(SIZES[:COUNT]), torch.float32)}
NORMED = {"module": norm_choices()["module"]}
SAMPLED = {"client_sampling": UniformSampler(2)}
MOMENTUM = {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}


class Halves(nn.Module):
    """A model in bfloat16."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model().bfloat16()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs.bfloat16())


HALVES = FLOATS | {"module": Halves()}


def with_dropout() -> nn.Module:
    """Return a model that draws at random in training."""
    return nn.Sequential(tiny_model().double(), nn.Dropout(0.3))


def with_nan(client: int) -> dict[str, Any]:
    """Return two rounds on data of which a client has an example that is no number."""
    data = tiny_data(sum(SIZES[:COUNT]))
    inputs, targets = data.train.fetch(torch.arange(len(data.train)))
    inputs[sum(SIZES[:client]), 0] = torch.nan
    return {"data": DataSplits(TensorSource(inputs, targets), data.test, data.classes), "rounds": 2}


def weighted() -> dict[str, Any]:
    """Return examples of unequal weights, whose sums are the weights of the clients."""
    weights = torch.rand(sum(SIZES[:COUNT]), generator=torch.Generator().manual_seed(0))
    sums = tuple(part.double().sum().item() for part in weights.split(SIZES[:COUNT]))
    return {"weights": ExampleWeights(weights, sums)}


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "sampling": ("fedavg_adam", SAMPLED),
    "sampling of clients with state": ("scaffold", SAMPLED),
    "sampling of clients that keep their optimizer": ("diloco", SAMPLED),
    "sampling under a robust rule": ("median", SAMPLED),
    "a round without clients": ("fedavg_momentum", {"client_sampling": Only(((0, 1), (), (2,)))}),
    "kept optimizers": ("fedavg", MOMENTUM | {"algorithm": fedavg(client_optimizer_state="keep")}),
    "epochs": ("fednova", {"round": RoundOptions(epochs=(1, 3))}),
    "post-local SGD": ("diloco", {"round": RoundOptions(steps=3, sync_rounds=1)}),
    "personal layers": ("fedavg", {"algorithm": fedavg(shared_params="^2")}),
    "personal layers of SCAFFOLD": ("scaffold", {"algorithm": scaffold(shared_params="^2")}),
    "fine-tuned models": ("fedavg", {"eval.personal_steps": 2}),
    "statistics": ("fedavg", NORMED),
    "plain means of statistics": ("fedavg_adam", NORMED | {"algorithm": fedavg(batchnorm_stats="mean")}),
    "personal statistics": ("fedavg", NORMED | {"algorithm": fedavg(shared_params="^(?!0)")}),
    "statistics of a sample": ("fedavg", NORMED | SAMPLED),
    "dropout": ("fedavg", {"module": with_dropout()}),
    "a frozen layer": ("fedavg", FLOATS | {"module": half_frozen()}),
    "an average of the weights": ("fedavg_momentum", {"ema_decay": 0.9}),
    "bfloat16": ("fedavg_adam", FLOATS | {"autocast": torch.bfloat16}),
    "float16": ("diloco", FLOATS | {"autocast": torch.float16}),
    "a model in bfloat16": ("fedavg_momentum", HALVES),
    "an average of models in bfloat16": ("averaging", HALVES),
    "clipping": ("fedavg", {"clip": ClipOptions(max_norm=0.1)}),
    "a schedule": ("fedavg", {"schedule": Linear()}),
    "micro-batches": ("fedavg", {"micro_batch_size": 2}),
    "weights of examples": ("fedavg", weighted()),
    "a client without numbers": ("fedavg_adam", with_nan(1)),
    "a client without numbers under a robust rule": ("trimmed_mean", with_nan(1)),
    "nobody with numbers": ("fedavg_momentum", with_nan(0) | {"client_sampling": Only(((0,), (1, 2)))}),
    "validation": ("fedavg", {"clients": held_out(SIZES[:COUNT], TEST_EXAMPLES)}),
    "an early end": (
        "fedavg",
        {"clients": held_out(SIZES[:COUNT], TEST_EXAMPLES), "stop": StopCriteria(metric_target=0.1)},
    ),
    "figures of nobody": ("fedavg", {"metrics.per_client": "none"}),
}


def assert_one_silo(federation: Federation, name: str, choices: dict[str, Any]) -> None:
    """Assert that a federation is the silo that trains all clients."""
    expected, result = in_one_silo(name, choices)
    rounding = 1e-6 if name in CLOSE else 1e-12
    compare = partial(assert_close, tolerance=rounding) if name in CLOSE else assert_same
    compare(federation.coordinator.model, expected.model)
    compare(federation.coordinator.algorithm, expected.algorithm)
    for site in federation.sites:
        assert_same(site.model, federation.coordinator.model)
    kept = every_client(federation.sites)
    assert set(kept) == set(expected.clients)
    for client, state in kept.items():
        compare(state, expected.clients[client])
    for outcome in (*federation.sites, federation.coordinator):
        for ours, theirs in zip(outcome.rounds, expected.rounds, strict=True):
            assert made(ours) == pytest.approx(made(theirs), rel=rounding, nan_ok=True)
    ended = result.pop("stopped", None)
    for ours in federation.results:
        assert ours.pop("stopped", None) == ended
        assert made(ours) == pytest.approx(made(result), rel=rounding, nan_ok=True)


def made(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that sites make too: personal parameters do not leave them, so there is no mean of these."""
    return {
        key: value for key, value in figures(metrics).items() if not key.startswith("global/") and "/global_" not in key
    }


def test_every_algorithm_is_a_row():
    """Every algorithm of the configuration is held to the law, or refused."""
    rows = {ROWS.get(name, name) for name in named_choices("algorithm")}
    assert rows <= CASES.keys()
    assert {"sync", "streaming", "delayed"} == REFUSED


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED - COMPRESSED))
@pytest.mark.quick_rows(4)
def test_sites_are_clients_of_one_silo(name: str):
    assert_one_silo(over_sites(name, SMALL), name, SMALL)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.quick_rows(6)
def test_sites_are_clients_of_one_silo_with(feature: str):
    name, choices = FEATURES[feature]
    assert_one_silo(over_sites(name, SMALL | choices), name, SMALL | choices)


@pytest.mark.parametrize("name", ["fedavg", "diloco"])
@pytest.mark.quick_rows(1)
def test_what_a_late_site_has_done_counts(name: str):
    """Two of its four steps: bit for bit a silo in which it was to take two."""
    federation = by_clock(over_sites, name, slow_choices(SLOW))
    expected, _ = in_one_silo(name, slow_choices(round=Planned(steps=STEPS, steps_of={SLOW: DONE})))
    assert [metrics["clients/stragglers"] for metrics in federation.coordinator.rounds] == [1, 1]
    assert_same(federation.coordinator.model, expected.model)
    assert_same(federation.coordinator.algorithm, expected.algorithm)


def test_a_late_site_that_is_dropped_was_never_there():
    late = by_clock(over_sites, "fedavg_momentum", slow_choices(SLOW, round=replace(DEADLINE, stragglers="drop")))
    others = tuple(client for client in range(len(SIZES)) if client != SLOW)
    choices = {"round": RoundOptions(steps=STEPS), "client_sampling": Only((others,))}
    expected, _ = in_one_silo("fedavg_momentum", slow_choices(SLOW, **choices))
    assert_close(late.coordinator.model, expected.model)


# Launches of their own


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "certificates"
    certify(folder, [COORDINATOR, "site-0", "site-1"])
    return folder


RANKED = {"fedavg_adam": NORMED | {"sizes": [40, 24]}, "int8": {}, "scaffold": {}, "diloco": {}}


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.quick_rows(1)
def test_a_site_of_two_ranks_is_a_silo_of_two(ranks, name: str, certificates: Path, tmp_path: Path):
    """Two launches, of two ranks and of one, over mutual TLS: bit for bit one world with silos=[2,1]."""
    choices = {"sizes": SIZES[:2], "rounds": 3} | RANKED[name]
    expected = ranks(3).run(at_silo, name, choices, [2, 1])
    sites: list[Future[list[tuple[Outcome, dict[str, Any]]]]] = []

    def start_sites(coordinator: Coordinator) -> None:
        for client, size in enumerate((2, 1)):
            site = options(certificates, name=f"site-{client}", server=f"127.0.0.1:{coordinator.server.port}")
            sites.append(pool.submit(ranks(size).run, as_member, site, name, choices, tmp_path / str(client)))

    def has_failed() -> bool:
        return any(site.done() and site.exception() for site in sites)

    part = options(certificates, listen="127.0.0.1:0", members=["site-0", "site-1"])
    with ThreadPoolExecutor() as pool:
        coordinator, _ = as_member(part, name, choices, tmp_path / "coordinator", start_sites, has_failed)
    assert_same(coordinator.model, expected[0][0].model)
    for (ours, _), (theirs, _) in zip((*sites[0].result(), *sites[1].result()), expected, strict=True):
        assert_same(ours.model, theirs.model)
        assert ours.clients.keys() == theirs.clients.keys()
        for client, state in ours.clients.items():
            assert_same(state, theirs.clients[client])


# Compression


CODECS = {"int8": Int8(8), "int4": Int4(8), "topk": TopK(0.3), "bf16": Cast("bfloat16"), "fp16": Cast("float16")}


@pytest.mark.parametrize("silos", [2, 3])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@pytest.mark.quick_rows(3)
def test_compressed_sites_are_silos_of_one_world(ranks, codec: Codec, silos: int):
    """Up to three silos decode what all others send, as the coordinator does: the same bits, residuals included."""
    choices = {"sizes": SIZES[:silos], "rounds": 4, "update_compression": codec, "eval.batch_size": 1}
    for name in ("fedavg_momentum", "scaffold"):
        federation = over_sites(name, choices)
        (expected, _), *_ = outcomes = ranks(silos).run(at_silo, name, choices, silos)
        assert_same(federation.coordinator.model, expected.model)
        for site, (silo, _) in zip(federation.sites, outcomes, strict=True):
            assert_same(site.model, expected.model)
            assert site.clients.keys() == silo.clients.keys()
            for client, state in site.clients.items():
                assert_same(state, silo.clients[client])


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@pytest.mark.quick_rows(2)
def test_the_coordinator_adds_what_it_decodes(codec: Codec):
    """X <- x - (((d_0 + d_1) + d_2) + ...), of decoded shares of the mean, in the order of the members."""
    hall = over_sites("fedavg", SMALL | {"update_compression": codec}).hall
    places = [hall.results[f"rounds/{index}/training"].tensors["vector/parameters"] for index in range(SMALL["rounds"])]
    for index, (before, after) in enumerate(pairwise(places), 1):
        decoded = []
        for name in hall.names:
            decoded.append(torch.empty_like(before))
            packet = hall.brought[f"rounds/{index}/training"][name].tensors["vector/delta"]
            assert packet.nbytes == codec.encoded_size(len(before)) < 0.7 * before.nbytes
            codec.decode(packet, decoded[-1])
        assert torch.equal(after, before - reduce(torch.add, decoded))


@pytest.mark.parametrize("name", ["int8", "int4_scaffold", "topk"])
@pytest.mark.quick_rows(1)
def test_what_a_site_has_not_sent_is_in_its_checkpoint(name: str, tmp_path: Path):
    """All members leave after two of four rounds: each continues from its own folder as if it had not."""
    choices = SMALL | {"rounds": 4}
    whole = over_sites(name, choices)
    over_sites(name, choices, tmp_path, until=2)
    resumed = over_sites(name, choices, tmp_path)
    assert_same(resumed.coordinator.model, whole.coordinator.model)
    for ours, theirs in zip(resumed.sites, whole.sites, strict=True):
        assert_same(ours.model, theirs.model)
        assert ours.clients.keys() == theirs.clients.keys()
        for client, state in ours.clients.items():
            assert_same(state, theirs.clients[client])


def test_a_site_that_is_not_counted_has_sent_nothing():
    """A residual is still to be sent: encoding the same vector again gives the same bytes."""
    with distributed(device="cpu") as world:
        upload = make_upload(replace(world, silo=1, silo_sizes=(1, 1, 1)), Int8(8))
        upload.start_round(Round(0, 0, ()).seed_for)
        vectors = {"delta": torch.randn(64, generator=torch.Generator().manual_seed(0))}
        kept = vectors["delta"].clone()
        first, again = upload.encode(vectors), upload.encode(vectors)
        assert torch.equal(vectors["delta"], kept) and torch.equal(first["delta"], again["delta"])
        upload.commit(vectors, again)
        decoded = decode_upload(Int8(8), again, vectors)["delta"]
        assert torch.equal(upload.state_dict()["delta"]["payload"]["0"], kept - decoded)
        assert not torch.equal(upload.encode(vectors)["delta"], first["delta"])


@pytest.mark.parametrize("index", [1 << 20, -1])
def test_an_update_with_an_index_that_is_none_is_refused(index: int):
    sent = torch.tensor([index] + [0] * 31, dtype=torch.int32).view(torch.uint8)
    with pytest.raises(ValueError, match="its update is no encoding of topk"):
        decode_upload(TopK(0.25), {"delta": sent}, {"delta": torch.zeros(64)})
