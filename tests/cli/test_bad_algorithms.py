"""What an algorithm cannot be combined with, or its slots cannot hold, is refused: key, value, what is valid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.refusals import assert_says, building, composing
from trainer.config.build import build
from trainer.config.compose import CONF, compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import Topology, distributed
from trainer.distributed.transport import Plain
from trainer.models.flat import FlatModel

FEDAVG, SCAFFOLD, FEDNOVA, KRUM = (
    [f"algorithm={name}", "silos=2"] for name in ("fedavg", "scaffold", "fednova", "krum")
)
TRACE = [*FEDAVG, "cohort=trace", "cohort.file=trace.csv"]


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
        [*SCAFFOLD, "clip_norm=1"],
        ["clip_norm=1", "algorithm=scaffold", "set clip_norm=null, or algorithm=fedavg"],
    ),
    "adaptive steps and ways": (
        [*FEDNOVA, "optimizer=adamw"],
        ["algorithm=fednova", "AdamW", "linear in the gradient", "set optimizer=sgd", "or algorithm=fedavg"],
    ),
    "clipping and ways": (
        [*FEDNOVA, "clip_norm=1"],
        ["clip_norm=1", "algorithm=fednova", "set clip_norm=null, or algorithm=fedavg"],
    ),
    "both of them": (
        [*SCAFFOLD, "optimizer=adamw", "clip_norm=1"],
        ["clip_norm=1", "set clip_norm=null", "AdamW", "set optimizer=sgd"],
    ),
    "an optimizer that asks for more": (
        [*FEDNOVA, "optimizer=custom", "optimizer._target_=torch.optim.LBFGS"],
        ["algorithm=fednova", "LBFGS", "closure", "set optimizer=sgd"],
    ),
    "kept state and control variates": (
        [*SCAFFOLD, "algorithm.inner_state=keep"],
        ["algorithm.inner_state=keep", "algorithm=scaffold", "set algorithm.inner_state=reset, or algorithm=fedavg"],
    ),
    "kept state and ways": (
        [*FEDNOVA, "algorithm.inner_state=keep"],
        ["algorithm.inner_state=keep", "algorithm=fednova", "set algorithm.inner_state=reset, or algorithm=fedavg"],
    ),
    "more liars than krum can bear": (
        [*KRUM, "clients=6", "algorithm.byzantine=2"],
        ["algorithm.byzantine=2", "6 clients a round", "7 or more", "or more clients"],
    ),
    "more liars than the cohort can bear": (
        [*KRUM, "clients=9", "cohort=sample", "cohort.size=4"],
        ["algorithm.byzantine=1", "4 clients a round", "5 or more", "a larger cohort.size"],
    ),
    "nothing that is shared": (
        [*FEDAVG, "algorithm.shared=nowhere"],
        ["algorithm.shared=nowhere", "its names: conv1.weight", "or algorithm=local"],
    ),
    "weights of clients that all weigh the same": (
        [*KRUM, "clients=5", "+algorithm.weight=examples"],
        ["algorithm.weight", "no argument", "Robust", "valid: algorithm.rule"],
    ),
    "personal layers that the model does not have": (
        ["algorithm=fedbn", "silos=2"],
        ["algorithm.shared=", "model=DigitsCNN", "its names: conv1.weight", "another pattern, or another model"],
    ),
    "a cohort and synchronous rounds": (
        [*FEDAVG, "round.synchronous=3", "clients=4", "cohort=sample", "cohort.size=2"],
        ["round.synchronous=3", "cohort", "set cohort=all, or round.synchronous=0"],
    ),
    "a cohort and one silo in step": (
        ["cohort=trace", "cohort.file=trace.csv"],
        ["cohort=trace", "algorithm=sync", "set cohort=all, or algorithm=fedavg"],
    ),
    "work that is dropped and one silo in step": (
        ["round.seconds=5", "round.late=drop"],
        ["round.late=drop", "algorithm=sync", "round.late=count"],
    ),
    "packed numbers and one silo in step": (
        ["uplink=int8"],
        ["uplink=int8", "algorithm=sync", "one silo", "set uplink=fp32, or algorithm=fedavg"],
    ),
    "packed numbers and a rule that compares them": (
        [*KRUM, "clients=5", "uplink=topk"],
        ["uplink=topk", "algorithm", "median or averaging", "set uplink=fp32, or algorithm=fedavg"],
    ),
    "packed numbers that are never sent": (
        ["algorithm=local", "silos=2", "uplink=bf16"],
        ["uplink=bf16", "algorithm.shared finds no parameter", "set uplink=fp32, or algorithm=fedavg"],
    ),
    "silos that are never combined": (
        ["algorithm=sync", "silos=2"],
        ["silos=2", "algorithm=sync", "set silos=1, or algorithm=fedavg"],
    ),
}
SLOTS = {
    "capped by nothing": ([*FEDAVG, "algorithm.weight=capped"], ["algorithm.weight=capped", "algorithm.cap", "from 1"]),
    "a cap of nothing": ([*FEDAVG, "algorithm.cap=5"], ["algorithm.weight=examples", "algorithm.cap=5", "capped"]),
    "a cap of 0": ([*SCAFFOLD, "algorithm.weight=capped", "algorithm.cap=0"], ["algorithm.cap=0", "from 1"]),
    "a pull away": ([*FEDAVG, "algorithm.pull=-0.1"], ["algorithm.pull=-0.1", "a number from 0"]),
    "no norm": ([*FEDAVG, "algorithm.norm_bound=0"], ["algorithm.norm_bound=0", "a number above 0, or null"]),
    "no pattern": ([*FEDAVG, "algorithm.shared='('"], ["algorithm.shared=(", "missing )"]),
    "moments": ([*FEDAVG, "algorithm.batch_statistics=x"], ["algorithm.batch_statistics=x", "valid: pooled or mean"]),
    "a rule": ([*KRUM, "algorithm.rule=mean"], ["algorithm.rule=mean", "median", "trimmed_mean", "krum"]),
    "half left out": (
        ["algorithm=trimmed_mean", "silos=2", "algorithm.trim=0.5"],
        ["algorithm.trim=0.5", "valid: trim from 0 below 0.5"],
    ),
    "less than none": (
        ["algorithm=trimmed_mean", "silos=2", "algorithm.trim=-0.1"],
        ["algorithm.trim=-0.1", "valid: trim from 0 below 0.5"],
    ),
    "fewer liars than none": ([*KRUM, "algorithm.byzantine=-1"], ["algorithm.byzantine=-1", "byzantine from 0"]),
    "half a liar": ([*KRUM, "algorithm.byzantine=1.5"], ["algorithm.byzantine=1.5", "valid: a whole number"]),
    "none selected": ([*KRUM, "algorithm.selected=0"], ["algorithm.selected=0", "selected from 1"]),
    "a type of 32 bits": (
        [*FEDAVG, "uplink=fp16", "uplink.dtype=float32"],
        ["uplink.dtype=float32", "valid: bfloat16 or float16"],
    ),
    "blocks that fill no bytes": ([*FEDAVG, "uplink=int4", "uplink.block=100"], ["uplink.block=100", "multiple of 8"]),
    "no block": ([*FEDAVG, "uplink=int8", "uplink.block=0"], ["uplink.block=0", "a multiple of 8, from 8"]),
    "more than all": ([*FEDAVG, "uplink=topk", "uplink.fraction=2"], ["uplink.fraction=2", "above 0, up to 0.5"]),
    "no rank": ([*FEDAVG, "uplink=powersgd", "uplink.rank=0"], ["uplink.rank=0", "a whole number from 1"]),
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
    "late": (["round.late=x"], ["round.late=x", "valid: count or drop"]),
    "seconds before": (["round.seconds=-1"], ["round.seconds=-1", "valid: a number from 0, or null"]),
    "synchronous rounds": (["round.synchronous=-1"], ["round.synchronous=-1", "valid: a whole number from 0"]),
    "a pattern without quotes": (
        [*FEDAVG, "algorithm.shared=^conv"],
        ["algorithm.shared=^conv cannot be read", "quote it: \"algorithm.shared='^conv'\""],
    ),
    "no trace": ([*FEDAVG, "cohort=trace"], ["cohort.file has no value", "set cohort.file="]),
}


@pytest.mark.parametrize(("overrides", "said"), (COMBINATIONS | SLOTS).values(), ids=(COMBINATIONS | SLOTS).keys())
def test_what_cannot_be_is_refused(overrides: list[str], said: list[str], topology: Topology) -> None:
    assert_says(building(overrides, topology), said)


@pytest.mark.parametrize(("overrides", "said"), ROUNDS.values(), ids=ROUNDS.keys())
def test_what_no_round_can_be_is_refused_before_workers_start(overrides: list[str], said: list[str]) -> None:
    assert_says(composing(overrides), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["No such file"]),
        ("round,client,event\n1,0,leave\n1,2,join\n", ["client 2", "0 to 1"]),
        ("round,client,event\n1,0,leave\n0,1,join\n", ["line 3", "round=0, client=1, event=join", "round (from 1)"]),
        ("round,client\n1,0\n", ["line 1", "columns round (from 1), client (from 0) and event (join or leave)"]),
    ],
    ids=["missing", "other clients", "round 0", "a column less"],
)
def test_a_trace_that_tells_nothing_is_refused(
    text: str | None, said: list[str], topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "trace.csv").write_text(text)
    assert_says(building(TRACE, topology), ["cohort.file=trace.csv", "valid:", *said])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "uplink").glob("*.yaml")))
def test_every_uplink_is_built_of_its_yaml(name: str, topology: Topology) -> None:
    """And is called as its choice is."""
    config = read_config(compose_tree([*FEDAVG, f"uplink={name}"]))
    assert build(config, replace(topology, silo_sizes=(1, 1))).uplink.name == name


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml")))
def test_every_algorithm_is_built_of_its_yaml(name: str, topology: Topology) -> None:
    """On the digits, with two silos where it can have them; model and server find each other."""
    sizes = (1,) if name == "sync" else (1, 1)
    norm = ["model.norm=batch"] if name == "fedbn" else []
    clients = 5 if name == "krum" else len(sizes)
    config = read_config(compose_tree([f"algorithm={name}", f"silos={len(sizes)}", f"clients={clients}", *norm]))
    run = build(config, replace(topology, silo_sizes=sizes))
    assert config.algorithm["_target_"] == f"trainer.algorithms.{type(run.algorithm).__name__}"
    assert run.round(0).cohort == tuple(range(clients))
    model = FlatModel(run.module, run.algorithm.is_shared, run.algorithm.batch_statistics)
    assert model.has_personal == (name in ("fedbn", "local"))
    run.algorithm.setup(model, run.optimizer, run.training_sizes, Plain(run.topology))
    assert set(run.algorithm.slice_state()) >= ({"server"} if name != "sync" else set())
