"""The plan: its options, the cost model against numbers computed by hand, its output and its measurements."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.folders import composed_tree
from tests.support.runs import fedavg, make_run
from trainer.algorithms import Median, Scaffold
from trainer.commands.plan.console import show
from trainer.commands.plan.cost_model import (
    CostModel,
    LinkSpeed,
    SiloLoad,
    StageTimes,
    Star,
    Traffic,
    averaging_seconds,
    estimate,
    ring_bytes,
    slowest_stage_times,
)
from trainer.commands.plan.dry_run import DryRun
from trainer.commands.plan.measure import RunPlan
from trainer.commands.plan.memory import peak_growth, tensors_of
from trainer.commands.plan.null_transport import NullTransport
from trainer.commands.plan.options import PlanOptions, parse_options, rate
from trainer.commands.plan.target_world import count_local_workers, is_remote_run, leader_topology, remote_nodes
from trainer.config.schema import LaunchConfig, read_config
from trainer.distributed.compression import Int8
from trainer.distributed.silos import silo_sizes
from trainer.distributed.topology import distributed
from trainer.distributed.transport import AllReduce, CompressedAllReduce

MB = 10**6


def launch(**changes: object) -> LaunchConfig:
    return replace(read_config(composed_tree(())).launch, **{"device": "cpu", **changes})  # pyright: ignore


# Options


@given(
    st.integers(1, 999),
    st.sampled_from(["", "k", "K", "M", "m", "G", "g", "T"]),
    st.sampled_from(["bit", "bit/s", "b/s", "bps", "B", "B/s"]),
    st.sampled_from(["", " "]),
)
def test_a_rate_is_bytes_a_second(number: int, prefix: str, unit: str, gap: str):
    power = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}[prefix.lower()]
    expected = number * 10**power / (1 if "B" in unit else 8)
    assert rate(f"{number}{gap}{prefix}{unit}") == pytest.approx(expected)


def test_binary_prefixes_have_an_i():
    assert rate("1.5MiB/s") == 1.5 * 2**20 and rate("8Kibit") == 1024
    assert rate("100mbit") == rate("100Mb/s") == rate("12.5MB/s") == 12.5 * MB


@given(st.text(max_size=12))
def test_other_texts_are_invalid_or_not_negative(text: str):
    assert rate(text) is None or rate(text) >= 0  # pyright: ignore[reportOptionalOperand]


def test_options_are_parsed():
    arguments = ["plan.ranks=64", "plan.bandwidth=100Mbit", "plan.latency=50ms"]
    assert parse_options(arguments) == PlanOptions(ranks=64, bandwidth=12.5 * MB, latency=0.05)
    options = parse_options(["plan.bandwidth_inside=1GB/s", "plan.seconds_per_step=.25"])
    assert options == PlanOptions(bandwidth_inside=1e9, seconds_per_step=0.25)


@pytest.mark.parametrize("text", ["fast", "100", "", "0Mbit", "-1Gbit", "1Gbit/h", "1 e9B", "10GBit"])
def test_an_invalid_rate_is_answered_with_valid_ones(text: str):
    with pytest.raises(ValueError, match=r"^plan.bandwidth=.*\n  valid: a rate above 0.*100Mbit"):
        parse_options([f"plan.bandwidth={text}"])


def test_all_errors_are_reported_at_once():
    with pytest.raises(ValueError, match=r"^plan\.") as error:
        parse_options(["plan.bandwith=1Gbit", "plan.ranks=0", "plan.latency=50", "plan.seconds_per_step=1s"])
    text = str(error.value)
    assert "plan.bandwith is not an option of plan; did you mean plan.bandwidth?" in text
    for expected in ("plan.ranks=0\n  valid: a whole number from 1", "plan.latency=50\n", "plan.seconds_per_step=1s\n"):
        assert expected in text


# The target world


def test_remote_ranks_fill_their_nodes():
    """Two on each node; with an elastic number of nodes, the largest number."""
    assert remote_nodes(launch(nproc_per_node=2), 5) == [0, 0, 1, 1, 2]
    assert remote_nodes(launch(nproc_per_node=2, nodes=3)) == [0, 0, 1, 1, 2, 2]
    assert remote_nodes(launch(nproc_per_node=1, nodes=(1, 4))) == [0, 1, 2, 3]
    assert silo_sizes("node", remote_nodes(launch(nproc_per_node=2), 5)) == (2, 2, 1)


def test_only_a_run_whose_links_are_given_is_remote():
    assert not is_remote_run(PlanOptions(), launch(nodes=3)), "the command runs on each node, and measures the links"
    assert is_remote_run(PlanOptions(bandwidth=MB), launch(nodes=3))
    assert not is_remote_run(PlanOptions(bandwidth=MB), launch(nodes=3), by_launcher=False)
    assert not is_remote_run(PlanOptions(bandwidth=MB), launch())
    assert is_remote_run(PlanOptions(ranks=2), launch())


def test_as_many_workers_measure_as_would_train_on_a_node():
    assert count_local_workers(PlanOptions(), launch(nproc_per_node=4)) == 4
    assert count_local_workers(PlanOptions(ranks=64), launch(nproc_per_node=8)) == 8
    assert count_local_workers(PlanOptions(ranks=3), launch(nproc_per_node=8)) == 3
    assert count_local_workers(PlanOptions(ranks=64, seconds_per_step=0.1), launch(nproc_per_node=8)) == 2


# Bytes and seconds


def costs_of(sizes: tuple[int, ...], **changes: object) -> CostModel:
    """Return the costs of silos of these sizes, with one client of 10 steps each and a vector of 1 MB a round."""
    vector = MB
    made = CostModel(
        loads=tuple(SiloLoad(replicas, clients=1, steps=10, examples=320) for replicas in sizes),
        stage_times={replicas: StageTimes(step=0.1, client=0.01, aggregation=0.02) for replicas in sizes},
        traffic=Traffic(gradients=vector, all_gathered=vector, inter_silo=2 * (len(sizes) - 1) * vector),
        intra_silo=LinkSpeed(100 * MB, 0.001, True) if max(sizes) > 1 else None,
        inter_silo=LinkSpeed(10 * MB, 0.05, False) if len(sizes) > 1 else None,
        rounds=4,
    )
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def test_bytes_of_two_silos_of_two():
    """A ring of 2 sends the gradients once from each end, in 10 steps; then each replica sends half of the vector."""
    assert costs_of((2, 2)).intra_silo_bytes == 10 * MB + MB / 2


def test_bytes_of_silos_of_three_and_one():
    """A ring of 3 sends 4/3 of the gradients from each rank; then two others get the vector."""
    assert ring_bytes(3 * MB, 3) == 4 * MB
    assert costs_of((3, 1)).intra_silo_bytes == pytest.approx((10 * 4 / 3 + 2 / 3) * MB)
    assert costs_of((1, 1)).intra_silo_bytes == 0


def test_seconds_of_a_round_of_two_silos_of_two():
    """The parts of a round, computed by hand.

    10 steps; 10 all-reduces of 1 ms and 1 MB at 100 MB/s; a client and the aggregation; then the header of 50 ms, the
    vectors of 50 ms and 1 MB at 10 MB/s, half a vector at 100 MB/s and 2 ms.
    """
    round = estimate(costs_of((2, 2)))
    assert round.computing == pytest.approx(1.0)
    assert round.averaging == pytest.approx(10 * (0.001 + 0.01))
    assert round.updating == pytest.approx(0.03)
    assert round.sending == pytest.approx(0.05 + 0.05 + 0.1 + 0.005 + 0.002)
    assert round.seconds == pytest.approx(1.347)


def test_the_silo_that_takes_longest_counts():
    """The silo of one replica takes 4 times as long for a step; only the other one averages gradients."""
    costs = costs_of((3, 1))
    times = {3: costs.stage_times[3], 1: replace(costs.stage_times[1], step=0.4)}
    round = estimate(replace(costs, stage_times=times))
    assert round.computing == pytest.approx(4.0) and round.averaging == 0
    assert round.sending == pytest.approx(0.05 + 0.05 + 0.1 + 2 * 0.01 + 0.002), "two copies, one after the other"


def test_a_single_rank_sends_nothing():
    round = estimate(costs_of((1,), traffic=Traffic(MB, 0, 0)))
    assert round.seconds == pytest.approx(1.03) and round.sending == round.averaging == 0


def test_gradients_are_averaged_in_the_buckets_of_ddp():
    """The buckets are 1 MiB, then 25 MiB each: 30 MiB are three all-reduces."""
    link = LinkSpeed(100 * MB, 0.001, True)
    assert averaging_seconds(1 << 20, 2, link) == pytest.approx(0.001 + (1 << 20) / (100 * MB))
    assert averaging_seconds(30 << 20, 4, link) == pytest.approx(0.003 + 1.5 * (30 << 20) / (100 * MB))


@given(st.integers(1, 100), st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 1, 1)]))
def test_longer_rounds_never_lower_the_utilisation(times: int, sizes: tuple[int, ...]):
    costs = costs_of(sizes)
    loads = tuple(replace(load, steps=times * load.steps) for load in costs.loads)
    shorter, longer = estimate(costs), estimate(replace(costs, loads=loads))
    assert longer.computing == pytest.approx(times * shorter.computing)
    utilisation = longer.computing / longer.seconds
    assert shorter.computing / shorter.seconds - 1e-9 <= utilisation <= 1


def test_communication_during_training_is_not_waited_for():
    """0.15 s between the silos are two steps of 0.1 s; one of them hides 0.1 s."""
    costs = costs_of((1, 1))
    waited = [estimate(replace(costs, overlap=steps)).sending for steps in (0, 1, 2, 50)]
    assert waited == pytest.approx([0.2, 0.1, 0.05, 0.05]), "the header is waited for"


def test_seconds_and_bytes_of_a_star():
    """3 sites send 1 MB each, and get 2 MB, at 10 MB/s, after 40 ms there and back; then inside."""
    star = Star(sites=3, brought=MB, fetched=2 * MB, link=LinkSpeed(10 * MB, 0.04, False))
    silos, site = costs_of((1, 1, 1), star=star), costs_of((2,), star=star)
    assert estimate(silos).sending == pytest.approx(0.04 + 0.9)
    assert estimate(site).sending == pytest.approx(0.04 + 0.9 + 0.005 + 0.002)


@pytest.mark.parametrize(
    ("choices", "brought", "fetched"),
    [
        ({"algorithm": fedavg()}, 4, 4),
        ({"algorithm": fedavg(drift_correction=Scaffold())}, 8, 8),
        ({"algorithm": fedavg(weighting="equal", rule=Median())}, 4, 4),
        ({"algorithm": fedavg(), "update_compression": Int8()}, 1 + 4 / 256, 4),
    ],
    ids=["fedavg", "scaffold", "median", "int8"],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_bytes_that_a_site_sends_and_gets(choices: dict[str, Any], brought: float, fetched: float, replicas: int):
    """For each parameter: a number of four bytes, or one and a share of a scale; of each vector that is exchanged."""
    topology = leader_topology(0, (replicas,), torch.device("cpu"))
    with distributed(device="cpu"):
        dry_run = DryRun(make_run(topology, [320], batch_size=32, **choices))
        count = len(dry_run.state.algorithm.global_state()["parameters"])
        assert dry_run.meeting() == (pytest.approx(brought * count, rel=0.02), fetched * count)


def test_averaging_that_was_measured_replaces_the_estimate_from_links():
    assert estimate(costs_of((3, 1), averaging={3: 0.05})).averaging == pytest.approx(10 * 0.05)
    assert estimate(costs_of((3, 1), averaging={3: 0.0})).averaging == 0


def test_ranks_that_wait_for_each_other_are_as_slow_as_the_slowest():
    assert slowest_stage_times([[StageTimes(1, 5, 2)], [StageTimes(3, 4, 1)]]) == StageTimes(3, 5, 2)


def test_ranks_that_are_slow_in_turn_are_as_slow_as_the_slowest_of_each_round():
    """Each rank is quick in two rounds of three, both in one of them; in the last round one rank is alone."""
    quick, slow = StageTimes(1, 1, 1), StageTimes(4, 4, 4)
    assert slowest_stage_times([[quick, slow, quick, quick], [slow, quick, quick]]) == slow


# The output


def plan_of(costs: CostModel) -> RunPlan:
    sizes = costs.silo_sizes
    run = make_run(
        leader_topology(0, sizes, torch.device("cpu")), [320] * len(sizes), algorithm=fedavg(), batch_size=32
    )
    return RunPlan(run, "MLP", 1, costs, {"parameters and buffers": 1_200_000, "gradients": 1_200_000})


STAR = Star(64, 10**10, 10**10, LinkSpeed(10**8, 0.04, False))


@pytest.mark.parametrize("star", [None, STAR], ids=["a world", "sites"])
@pytest.mark.parametrize("sizes", [(1,), (2,), (2, 2), (3, 1), (8,) * 64], ids=str)
def test_the_output_has_eighty_columns(sizes: tuple[int, ...], star: Star | None):
    console = Console(file=StringIO(), width=80)
    show(plan_of(costs_of(sizes, star=star)), console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(line.startswith("the whole round") for line in lines)
    assert any(line.split() == ["all", "2.4", "MB"] for line in lines)


# The null transport


def test_a_null_transport_returns_vectors_and_counts_what_would_be_sent():
    topology = leader_topology(1, (2, 2), torch.device("cpu"))
    transport = NullTransport(AllReduce(topology), 2, rows=3)
    vector = torch.arange(64.0)
    chunks = {(part.start, part.stop): total for part, total in transport.all_reduce_async(vector, "deltas", offset=64)}
    assert list(chunks) == [(64, 96)] and torch.equal(chunks[64, 96], vector[:32])
    assert transport.bytes_sent == 2 * 64 * 4
    assert transport.all_gather(vector) is vector and transport.bytes_all_gathered == 64 * 4
    row = transport.all_reduce_columns(torch.stack([vector, vector]), lambda rows, add_up: rows.mean(0))
    assert row.shape == (64,) and transport.bytes_held == 3 * 32 * 4
    assert transport.bytes_sent == 2 * 64 * 4 + (3 + 2) * 32 * 4


def test_a_null_transport_that_compresses_returns_vectors_unchanged():
    topology = leader_topology(0, (1, 1), torch.device("cpu"))
    transport = NullTransport(CompressedAllReduce(topology, Int8()), 2, rows=0)
    vector = torch.linspace(-1, 1, 1024)
    ((_, total),) = transport.all_reduce_async(vector, "deltas")
    assert torch.equal(total, torch.linspace(-1, 1, 1024))
    assert 2 * 1024 <= transport.bytes_sent < 2 * 1024 * 1.1, "a byte for each number, and the scales"


# Memory


def test_growth_is_what_was_held_at_once():
    """256 MiB are held at once, in pieces with a mapping each; memory held before, or freed again, does not count."""
    piece = 2**24  # numbers: 64 MiB
    held = [torch.ones(piece)]

    def action() -> None:
        held.append(torch.ones(piece))
        held.append(torch.ones(3 * piece))
        del held[1:]
        torch.ones(piece)

    assert peak_growth(torch.device("cpu"), action) == pytest.approx(4 * 4 * piece, rel=0.05)


def test_tensors_are_found_in_trees():
    one, two = torch.zeros(1), torch.zeros(2)
    assert list(tensors_of({"a": [one, 3], "b": {"c": (two, "text")}})) == [one, two]
