"""Combinations that an algorithm does not support, and invalid values of its keys and rounds, are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.command import named_choices
from tests.cli.refusals import assert_says, building, composing
from trainer.config.build import build
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import Topology, distributed
from trainer.distributed.transport import AllReduce
from trainer.models.flat import FlatModel

FEDAVG, SCAFFOLD, FEDNOVA, KRUM = (
    [f"algorithm={name}", "silos=2"] for name in ("fedavg", "scaffold", "fednova", "krum")
)
TRACE = [*FEDAVG, "client_sampling=trace", "client_sampling.file=trace.csv"]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with distributed(device="cpu") as topology:
        yield topology


COMBINATIONS = {
    "adaptive steps and control variates": (
        [*SCAFFOLD, "optimizer=adamw"],
        ["algorithm=scaffold", "AdamW", "linear in the gradient", "set optimizer=sgd", "or algorithm=fedavg"],
    ),
    "clipping and control variates": (
        [*SCAFFOLD, "clip.max_norm=1"],
        ["clip.max_norm=1", "algorithm=scaffold", "set clip.max_norm=null, or algorithm=fedavg"],
    ),
    "adaptive steps and ways": (
        [*FEDNOVA, "optimizer=adamw"],
        ["algorithm=fednova", "AdamW", "linear in the gradient", "set optimizer=sgd", "or algorithm=fedavg"],
    ),
    "clipping and ways": (
        [*FEDNOVA, "clip.max_norm=1"],
        ["clip.max_norm=1", "algorithm=fednova", "set clip.max_norm=null, or algorithm=fedavg"],
    ),
    "both of them": (
        [*SCAFFOLD, "optimizer=adamw", "clip.max_norm=1"],
        ["clip.max_norm=1", "set clip.max_norm=null", "AdamW", "set optimizer=sgd"],
    ),
    "an optimizer that asks for more": (
        [*FEDNOVA, "optimizer=custom", "optimizer._target_=torch.optim.LBFGS"],
        ["LBFGS", "closure", "such as SGD"],
    ),
    "kept state and control variates": (
        [*SCAFFOLD, "algorithm.client_optimizer_state=keep"],
        [
            "algorithm.client_optimizer_state=keep",
            "algorithm=scaffold",
            "set algorithm.client_optimizer_state=reset, or algorithm=fedavg",
        ],
    ),
    "kept state and ways": (
        [*FEDNOVA, "algorithm.client_optimizer_state=keep"],
        [
            "algorithm.client_optimizer_state=keep",
            "algorithm=fednova",
            "set algorithm.client_optimizer_state=reset, or algorithm=fedavg",
        ],
    ),
    "more liars than krum can bear": (
        [*KRUM, "clients=6", "algorithm.rule.byzantine=2"],
        ["algorithm.rule.byzantine=2", "6 clients a round", "7 or more", "more clients"],
    ),
    "more liars than the cohort can bear": (
        [*KRUM, "clients=9", "client_sampling=sample", "client_sampling.clients_per_round=4"],
        ["algorithm.rule.byzantine=1", "4 clients a round", "5 or more", "a larger client_sampling.clients_per_round"],
    ),
    "nothing that is shared": (
        [*FEDAVG, "algorithm.shared_params=nowhere"],
        ["algorithm.shared_params=nowhere", "its names: conv1.weight", "or algorithm=local"],
    ),
    "weights of clients that all weigh the same": (
        [*KRUM, "clients=5", "algorithm.weighting=examples"],
        ["algorithm.weighting=examples", "a robust rule", "set algorithm.weighting=equal"],
    ),
    "personal layers that the model does not have": (
        ["algorithm=fedbn", "silos=2"],
        ["algorithm.shared_params=", "model=DigitsCNN", "its names: conv1.weight", "another pattern, or another model"],
    ),
    "a cohort and synchronous rounds": (
        [*FEDAVG, "round.sync_rounds=3", "clients=4", "client_sampling=sample", "client_sampling.clients_per_round=2"],
        ["round.sync_rounds=3", "cohort", "set client_sampling=all, or round.sync_rounds=0"],
    ),
    "a cohort and one silo in step": (
        ["client_sampling=trace", "client_sampling.file=trace.csv"],
        ["client_sampling=trace", "algorithm=sync", "set client_sampling=all, or algorithm=fedavg"],
    ),
    "work that is dropped and one silo in step": (
        ["round.deadline_seconds=5", "round.stragglers=drop"],
        ["round.stragglers=drop", "algorithm=sync", "round.stragglers=keep"],
    ),
    "packed numbers and one silo in step": (
        ["update_compression=int8"],
        ["update_compression=int8", "algorithm=sync", "one silo", "set update_compression=fp32, or algorithm=fedavg"],
    ),
    "packed numbers and a rule that compares them": (
        [*KRUM, "clients=5", "update_compression=topk"],
        [
            "update_compression=topk",
            "algorithm",
            "median or averaging",
            "set update_compression=fp32, or algorithm=fedavg",
        ],
    ),
    "packed numbers that are never sent": (
        ["algorithm=local", "silos=2", "update_compression=bf16"],
        [
            "update_compression=bf16",
            "algorithm.shared_params finds no parameter",
            "set update_compression=fp32, or algorithm=fedavg",
        ],
    ),
    "silos that are never combined": (
        ["algorithm=sync", "silos=2"],
        ["silos=2", "algorithm=sync", "set silos=1, or algorithm=fedavg"],
    ),
}
SLOTS = {
    "capped by nothing": (
        [*FEDAVG, "algorithm.weighting=capped"],
        ["algorithm.weighting=capped", "algorithm.max_weight", "from 1"],
    ),
    "a cap of nothing": (
        [*FEDAVG, "algorithm.max_weight=5"],
        ["algorithm.weighting=examples", "algorithm.max_weight=5", "capped"],
    ),
    "a cap of 0": (
        [*SCAFFOLD, "algorithm.weighting=capped", "algorithm.max_weight=0"],
        ["algorithm.max_weight=0", "from 1"],
    ),
    "a pull away": ([*FEDAVG, "algorithm.proximal_mu=-0.1"], ["algorithm.proximal_mu=-0.1", "a number from 0"]),
    "no norm": ([*FEDAVG, "algorithm.max_update_norm=0"], ["algorithm.max_update_norm=0", "a number above 0, or null"]),
    "no pattern": ([*FEDAVG, "algorithm.shared_params='('"], ["algorithm.shared_params=(", "missing )"]),
    "moments": ([*FEDAVG, "algorithm.batchnorm_stats=x"], ["algorithm.batchnorm_stats=x", "valid: pooled or mean"]),
    "a rule": ([*KRUM, "algorithm.rule=mean"], ["algorithm.rule=mean", "valid: a mapping with a _target_"]),
    "half left out": (
        ["algorithm=trimmed_mean", "silos=2", "algorithm.rule.trim=0.5"],
        ["algorithm.rule.trim=0.5", "valid: a number from 0 to below 0.5"],
    ),
    "less than none": (
        ["algorithm=trimmed_mean", "silos=2", "algorithm.rule.trim=-0.1"],
        ["algorithm.rule.trim=-0.1", "valid: a number from 0 to below 0.5"],
    ),
    "fewer liars than none": (
        [*KRUM, "algorithm.rule.byzantine=-1"],
        ["algorithm.rule.byzantine=-1", "byzantine from 0"],
    ),
    "half a liar": ([*KRUM, "algorithm.rule.byzantine=1.5"], ["algorithm.rule.byzantine=1.5", "valid: a whole number"]),
    "none selected": ([*KRUM, "algorithm.rule.selected=0"], ["algorithm.rule.selected=0", "selected from 1"]),
    "a type of 32 bits": (
        [*FEDAVG, "update_compression=fp16", "update_compression.dtype=float32"],
        ["update_compression.dtype=float32", "valid: bfloat16 or float16"],
    ),
    "blocks that fill no bytes": (
        [*FEDAVG, "update_compression=int4", "update_compression.block=100"],
        ["update_compression.block=100", "multiple of 8"],
    ),
    "no block": (
        [*FEDAVG, "update_compression=int8", "update_compression.block=0"],
        ["update_compression.block=0", "a multiple of 8, from 8"],
    ),
    "more than all": (
        [*FEDAVG, "update_compression=topk", "update_compression.fraction=2"],
        ["update_compression.fraction=2", "above 0, up to 0.5"],
    ),
    "no rank": (
        [*FEDAVG, "update_compression=powersgd", "update_compression.rank=0"],
        ["update_compression.rank=0", "a whole number from 1"],
    ),
    "a server for none": (
        ["algorithm=averaging", "silos=2", "server=adam"],
        [
            "server=torch.optim.Adam with algorithm=trainer.algorithms.ModelAveraging",
            "server.lr=0.01",
            "algorithm=fedavg",
        ],
    ),
    "a server for one silo": (["server.lr=0.5"], ["server=torch.optim.SGD with algorithm=trainer.algorithms.Sync"]),
    "a server's rule": (
        [*FEDAVG, "server=fedadam", "server.rule=unknown"],
        ["server.rule=unknown", "valid: adagrad or adam or yogi"],
    ),
    "a server's tau": (["algorithm=fedadam", "silos=2", "server.tau=0"], ["server.tau=0", "tau above 0"]),
    "a server's betas": (
        ["algorithm=fedyogi", "silos=2", "server.betas=[0.9,1.0]"],
        ["server.betas=[0.9, 1.0]", "betas from 0 to below 1"],
    ),
}
ROUNDS = {
    "a span the wrong way": (["round.epochs=[5,2]"], ["round.epochs=[5,2]", "a whole number from 1", "such as [2,5]"]),
    "half a span": (["round.epochs=[2]"], ["round.epochs=[2]", "such as [2,5]"]),
    "a span from 0": (["round.epochs=[0,2]"], ["round.epochs=[0,2]", "such as [2,5]"]),
    "late": (["round.stragglers=x"], ["round.stragglers=x", "valid: keep or drop"]),
    "seconds before": (["round.deadline_seconds=-1"], ["round.deadline_seconds=-1", "valid: a number from 0, or null"]),
    "synchronous rounds": (["round.sync_rounds=-1"], ["round.sync_rounds=-1", "valid: a whole number from 0"]),
    "a pattern without quotes": (
        [*FEDAVG, "algorithm.shared_params=^conv"],
        ["algorithm.shared_params=^conv cannot be read", "needs quotes: \"algorithm.shared_params='^conv'\""],
    ),
    "no trace": (
        [*FEDAVG, "client_sampling=trace"],
        ["client_sampling.file has no value", "set client_sampling.file="],
    ),
}


@pytest.mark.parametrize(("overrides", "message"), (COMBINATIONS | SLOTS).values(), ids=(COMBINATIONS | SLOTS).keys())
@pytest.mark.quick_rows(14)
def test_invalid_combinations_and_values_are_refused(
    overrides: list[str], message: list[str], topology: Topology
) -> None:
    assert_says(building(overrides, topology), message)


@pytest.mark.parametrize(("overrides", "message"), ROUNDS.values(), ids=ROUNDS.keys())
def test_invalid_rounds_are_refused_before_workers_start(overrides: list[str], message: list[str]) -> None:
    assert_says(composing(overrides), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ["No such file"]),
        ("round,client,event\n1,0,leave\n1,2,join\n", ["client 2", "0 to 1"]),
        ("round,client,event\n1,0,leave\n0,1,join\n", ["line 3", "round=0, client=1, event=join", "round (from 1)"]),
        ("round,client\n1,0\n", ["line 1", "columns round (from 1), client (from 0) and event (join or leave)"]),
    ],
    ids=["missing", "other clients", "round 0", "a column less"],
)
def test_an_invalid_trace_is_refused(
    text: str | None, message: list[str], topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "trace.csv").write_text(text)
    assert_says(building(TRACE, topology), ["client_sampling.file=trace.csv", "valid:", *message])


@pytest.mark.parametrize("name", named_choices("update_compression"))
def test_every_update_compression_is_built_from_its_yaml(name: str, topology: Topology) -> None:
    """The built compression has the name of its choice."""
    config = read_config(compose_tree([*FEDAVG, f"update_compression={name}"]))
    assert build(config, replace(topology, silo_sizes=(1, 1))).update_compression.name == name


@pytest.mark.parametrize("name", named_choices("algorithm"))
@pytest.mark.quick_rows(7)
def test_every_algorithm_is_built_from_its_yaml(name: str, topology: Topology) -> None:
    """Each is built on the digits, with two silos if it supports them."""
    sizes = (1,) if name == "sync" else (1, 1)
    norm = ["model.norm=batch"] if name == "fedbn" else []
    clients = 5 if name == "krum" else len(sizes)
    config = read_config(compose_tree([f"algorithm={name}", f"silos={len(sizes)}", f"clients={clients}", *norm]))
    run = build(config, replace(topology, silo_sizes=sizes))
    assert config.algorithm["_target_"] == f"trainer.algorithms.{type(run.algorithm).__name__}"
    assert run.sample_round(0).cohort == tuple(range(clients))
    model = FlatModel(run.model(), run.algorithm.is_shared, run.algorithm.batchnorm_stats)
    assert model.has_personal == (name in ("fedbn", "local"))
    live = run.algorithm.setup(model, run.optimizer, run.training_sizes, AllReduce(run.topology))
    assert set(live.sharded_state_dict()) >= ({"server"} if name not in ("sync", "averaging") else set())
