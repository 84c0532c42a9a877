"""The plan's arithmetic, held against numbers made by hand, and its page."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.folders import composed_tree
from tests.support.runs import fedavg, make_run
from trainer.commands.plan.advice import advice
from trainer.commands.plan.console import show, size
from trainer.commands.plan.cost_model import (
    CompressionCost,
    CostModel,
    LinkSpeed,
    SiloLoad,
    StageTimes,
    Traffic,
    slowest_stage_times,
)
from trainer.commands.plan.estimate import estimate, seconds_to_average
from trainer.commands.plan.measure import RunPlan
from trainer.commands.plan.memory import peak_growth, tensors_of
from trainer.commands.plan.null_transport import NullTransport
from trainer.commands.plan.options import PlanOptions, parse_options, rate, split_arguments
from trainer.commands.plan.target_world import count_local_workers, is_remote_run, leader_topology, remote_nodes
from trainer.commands.plan.traffic import SentBytes, all_gather_traffic, gradient_traffic, inter_silo_traffic
from trainer.config.schema import LaunchConfig, read_config
from trainer.distributed.topology import silo_sizes
from trainer.distributed.transport import AllReduce

MB = 10**6


def launch(**changes: object) -> LaunchConfig:
    return replace(read_config(composed_tree(())).launch, **{"device": "cpu", **changes})  # pyright: ignore


# What is said under plan.


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


def test_prefixes_of_1024_are_told_by_their_i():
    assert rate("1.5MiB/s") == 1.5 * 2**20 and rate("8Kibit") == 1024
    assert rate("100mbit") == rate("100Mb/s") == rate("12.5MB/s") == 12.5 * MB


@given(st.text(max_size=12))
def test_other_texts_are_no_rate_or_a_positive_one(text: str):
    assert rate(text) is None or rate(text) >= 0  # pyright: ignore[reportOptionalOperand]


def test_wishes_are_read_and_the_rest_is_the_runs():
    own, overrides = split_arguments(["plan.ranks=64", "silos=2", "plan.bandwidth=100Mbit", "plan.latency=50ms"])
    assert overrides == ["silos=2"]
    assert parse_options(own) == PlanOptions(ranks=64, bandwidth=12.5 * MB, latency=0.05)
    told = parse_options(["plan.bandwidth_inside=1GB/s", "plan.seconds_per_step=.25"])
    assert told == PlanOptions(bandwidth_inside=1e9, seconds_per_step=0.25)


@pytest.mark.parametrize("text", ["fast", "100", "", "0Mbit", "-1Gbit", "1Gbit/h", "1 e9B", "10GBit"])
def test_a_bad_rate_is_answered_with_good_ones(text: str):
    with pytest.raises(ValueError, match=r"^plan.bandwidth=.*\n  valid: a rate above 0.*100Mbit"):
        parse_options([f"plan.bandwidth={text}"])


def test_all_faults_are_said_at_once():
    with pytest.raises(ValueError) as refusal:
        parse_options(["plan.bandwith=1Gbit", "plan.ranks=0", "plan.latency=50", "plan.seconds_per_step=1s"])
    said = str(refusal.value)
    assert "plan.bandwith is no key of the plan; did you mean plan.bandwidth?" in said
    for expected in ("plan.ranks=0\n  valid: a whole number from 1", "plan.latency=50\n", "plan.seconds_per_step=1s\n"):
        assert expected in said


# The mesh


def test_ranks_elsewhere_fill_their_nodes():
    """Two a node; of nodes that may come and go as many as there can be."""
    told = PlanOptions(bandwidth=MB)
    assert remote_nodes(PlanOptions(ranks=5), launch(nproc_per_node=2)) == [0, 0, 1, 1, 2]
    assert remote_nodes(told, launch(nproc_per_node=2, nodes=3)) == [0, 0, 1, 1, 2, 2]
    assert remote_nodes(told, launch(nproc_per_node=1, nodes=[1, 4])) == [0, 1, 2, 3]
    assert silo_sizes("node", remote_nodes(PlanOptions(ranks=5), launch(nproc_per_node=2))) == (2, 2, 1)


def test_only_a_run_whose_links_are_told_is_elsewhere():
    assert not is_remote_run(PlanOptions(), launch(nodes=3)), (
        "the command is typed on each node, and measures the links"
    )
    assert is_remote_run(PlanOptions(bandwidth=MB), launch(nodes=3))
    assert not is_remote_run(PlanOptions(bandwidth=MB), launch(nodes=3), by_launcher=False)
    assert not is_remote_run(PlanOptions(bandwidth=MB), launch())
    assert is_remote_run(PlanOptions(ranks=2), launch())


def test_as_many_workers_look_around_as_would_train_on_a_node():
    assert count_local_workers(PlanOptions(), launch(nproc_per_node=4)) == 4
    assert count_local_workers(PlanOptions(ranks=64), launch(nproc_per_node=8)) == 8
    assert count_local_workers(PlanOptions(ranks=3), launch(nproc_per_node=8)) == 3
    assert count_local_workers(PlanOptions(ranks=64, seconds_per_step=0.1), launch(nproc_per_node=8)) == 2


# Bytes and seconds


def costs_of(sizes: tuple[int, ...], **changes: object) -> CostModel:
    """Silos of these sizes, one client of 10 steps each; a vector of 1 MB, summed once a round."""
    vector = MB
    made = CostModel(
        loads=tuple(SiloLoad(replicas, clients=1, steps=10, examples=320) for replicas in sizes),
        stage_times={replicas: StageTimes(step=0.1, client=0.01, combination=0.02) for replicas in sizes},
        traffic=Traffic(gradients=vector, all_gathered=vector, inter_silo=2 * (len(sizes) - 1) * vector),
        intra_silo=LinkSpeed(100 * MB, 0.001, True) if max(sizes) > 1 else None,
        inter_silo=LinkSpeed(10 * MB, 0.05, False) if len(sizes) > 1 else None,
        rounds=4,
    )
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def test_bytes_of_two_silos_of_two():
    """A ring of 2 sends the vector once from each end; each replica sends its half between the silos."""
    costs = costs_of((2, 2))
    assert gradient_traffic(costs) == SentBytes(MB, 2 * MB, 4 * MB)
    assert all_gather_traffic(costs) == SentBytes(MB / 2, MB, 2 * MB)
    assert inter_silo_traffic(costs) == SentBytes(MB / 2, MB, 2 * MB)
    assert inter_silo_traffic(costs).scaled(4) == SentBytes(2 * MB, 4 * MB, 8 * MB)


def test_bytes_of_silos_of_three_and_one():
    """A ring of 3 sends 4/3 of the vector from each rank. Leaders send it whole, and then to two others."""
    costs = costs_of((3, 1))
    assert gradient_traffic(costs).rank == pytest.approx(4 / 3 * MB)
    assert (gradient_traffic(costs).silo, gradient_traffic(costs).all) == pytest.approx((4 * MB, 4 * MB))
    assert all_gather_traffic(costs) == SentBytes(2 / 3 * MB, 2 * MB, 2 * MB)
    assert inter_silo_traffic(costs) == SentBytes(MB, MB, 2 * MB)


def test_seconds_of_a_round_of_two_silos_of_two():
    """10 steps; 10 sums of 1 ms and 1 MB at 100 MB/s; a client and a combination; then the header of 50 ms, the
    vectors of 50 ms and 1 MB at 10 MB/s, half a vector at 100 MB/s and 2 ms.
    """
    now = estimate(costs_of((2, 2)))
    assert now.steps == 10 and now.computing == pytest.approx(1.0)
    assert now.averaging == pytest.approx(10 * (0.001 + 0.01))
    assert now.passing == pytest.approx(0.03)
    assert now.sending == pytest.approx(0.05 + 0.05 + 0.1 + 0.005 + 0.002)
    assert now.seconds == pytest.approx(1.347) and now.utilisation == pytest.approx(1 / 1.347)


def test_the_silo_that_takes_longest_counts():
    """The silo of one replica takes 4 times as long for a step; only the other one averages."""
    costs = costs_of((3, 1))
    paces = {3: costs.stage_times[3], 1: replace(costs.stage_times[1], step=0.4)}
    now = estimate(replace(costs, paces=paces))
    assert now.computing == pytest.approx(4.0) and now.averaging == 0
    assert now.sending == pytest.approx(0.05 + 0.05 + 0.1 + 2 * 0.01 + 0.002), "two copies, one after the other"


def test_a_single_rank_sends_nothing():
    now = estimate(costs_of((1,), traffic=Traffic(MB, 0, 0)))
    assert now.seconds == pytest.approx(1.03) and now.sending == now.averaging == 0


def test_gradients_are_averaged_in_the_buckets_of_ddp():
    """1 MiB, then 25 MiB at a time: 30 MiB are three sums."""
    line = LinkSpeed(100 * MB, 0.001, True)
    assert seconds_to_average(1 << 20, 2, line) == pytest.approx(0.001 + (1 << 20) / (100 * MB))
    assert seconds_to_average(30 << 20, 4, line) == pytest.approx(0.003 + 1.5 * (30 << 20) / (100 * MB))


@given(st.floats(1, 100), st.sampled_from([(1, 1), (2, 2), (3, 1), (1, 1, 1)]))
def test_longer_rounds_never_lower_the_utilisation(times: float, sizes: tuple[int, ...]):
    """Up to rounding to whole steps, which both sides have."""
    costs = costs_of(sizes)
    shorter, longer = estimate(costs), estimate(costs, times)
    assert longer.steps >= shorter.steps and longer.utilisation >= shorter.utilisation - 1e-9
    assert 0 < longer.utilisation <= 1


def test_a_round_has_a_step_of_each_client_at_least():
    assert estimate(costs_of((1, 1)), 0.001).steps == 1
    many = tuple(replace(load, clients=5) for load in costs_of((1, 1)).loads)
    assert estimate(costs_of((1, 1), loads=many), 0.001).steps == 5


def test_averaging_that_was_measured_counts_in_the_place_of_the_links():
    now = estimate(costs_of((3, 1), averaging={3: 0.05}))
    assert now.averaging == pytest.approx(10 * 0.05)
    assert estimate(costs_of((3, 1), averaging={3: 0.0})).averaging == 0


def test_ranks_that_wait_for_each_other_are_as_slow_as_the_slowest():
    assert slowest_stage_times([[StageTimes(1, 5, 2)], [StageTimes(3, 4, 1)]]) == StageTimes(3, 5, 2)


def test_ranks_that_are_slow_in_turn_are_as_slow_as_the_slowest_of_each_round():
    """Each is quick in two rounds of three, both at once in one: the last round is of one of them alone."""
    quick, slow = StageTimes(1, 1, 1), StageTimes(4, 4, 4)
    assert slowest_stage_times([[quick, slow, quick, quick], [slow, quick, quick]]) == slow


# What would help most


def test_where_ranks_compute_nothing_would_help():
    (said,) = advice(costs_of((1, 1), between=LinkSpeed(1e12, 0.0, True)))
    assert said.startswith("Nothing would help much: the ranks compute 97% of the time")


def test_longer_rounds_help_where_the_link_is_slow():
    """0.23 s are spent once a round: 9 times as much are 21 steps."""
    (said,) = advice(costs_of((1, 1)))
    assert "Rounds of 21 steps instead of 10 bring the utilisation to 0.90" in said and "0.23 s" in said


def test_what_is_sent_while_training_goes_on_is_not_waited_for():
    """0.15 s between the silos are two steps of 0.1 s; one of them hides 0.1 s."""
    costs = costs_of((1, 1))
    waited = [estimate(replace(costs, overlap=steps)).sending for steps in (0, 1, 2, 50)]
    assert waited == pytest.approx([0.2, 0.1, 0.05, 0.05]), "the header is waited for"
    said = "\n".join(advice(replace(costs, can_overlap=True)))
    assert "algorithm.overlap_steps=2, brings the utilisation to 0.93" in said
    assert said.index("Training on") < said.index("Rounds of 21 steps"), "what helps most comes first"


def test_an_uplink_sends_fewer_bytes_and_takes_time_to_pack():
    """A fourth of the bytes: 0.025 s instead of 0.1, and 0.03 s of packing; a tenth for 0.001 s is better by far."""
    offered = {
        "fp32": CompressionCost(2 * MB, 0.0),
        "int8": CompressionCost(MB // 2, 0.03),
        "topk": CompressionCost(MB // 5, 0.001),
    }
    costs = costs_of((1, 1), uplink="fp32", packings=offered)
    before, after = estimate(costs), estimate(costs.with_uplink("int8"))
    assert before == estimate(costs_of((1, 1))), "what is not packed costs nothing more"
    assert after.sending == pytest.approx(before.sending - 0.075)
    assert after.passing == pytest.approx(before.passing + 0.03)
    assert "update_compression=topk sends 10% of the bytes" in "\n".join(advice(costs))
    close = replace(costs, packings=offered | {"int8": CompressionCost(MB // 2, 0.0)})
    assert "update_compression=int8 sends 25% of the bytes" in "\n".join(advice(close)), "it loses less, and is as good"


def test_larger_batches_help_where_gradients_are_averaged():
    """A step of 0.1 s and a sum of 0.113 s; and once a round 30 ms over memory and the header of 13."""
    costs = costs_of((2,), inside=LinkSpeed(10 * MB, 0.013, True), traffic=Traffic(MB, 0, 0))
    (said,) = advice(costs)
    assert "twice the batch_size" in said and f"utilisation to {1 / (1 + 1.13 / 2 + 0.043):.2f}" in said


# The page


def plan_of(costs: CostModel) -> RunPlan:
    sizes = costs.silo_sizes
    run = make_run(
        leader_topology(0, sizes, torch.device("cpu")), [320] * len(sizes), algorithm=fedavg(), batch_size=32
    )
    return RunPlan(run, 1, costs, {"parameters and buffers": 1_200_000, "gradients": 1_200_000})


@pytest.mark.parametrize("sizes", [(1,), (2,), (2, 2), (3, 1), (8,) * 64], ids=str)
def test_the_page_has_eighty_columns(sizes: tuple[int, ...]):
    console = Console(file=StringIO(), width=80)
    offered = {name: CompressionCost(1000, 0.001) for name in ("fp32", "bf16", "int8", "int4", "topk")}
    show(plan_of(costs_of(sizes, uplink="fp32", packings=offered)), console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(line.startswith("the whole round") for line in lines)
    assert any(line.split() == ["all", "2.4", "MB"] for line in lines)


def test_sizes_are_said_in_prefixes_of_si():
    assert [size(value) for value in (0, 999, 172_288, 3.5e9)] == ["0 B", "999 B", "172.3 kB", "3.5 GB"]


# The wire to nobody


def test_a_silent_wire_gives_back_and_counts_what_would_be_sent():
    topology = leader_topology(1, (2, 2), torch.device("cpu"))
    wire = NullTransport(AllReduce(topology), 2, rows=3)
    vector = torch.arange(64.0)
    parts = {(part.start, part.stop): total for part, total in wire.all_reduce_async(vector, "deltas", offset=64)}
    assert list(parts) == [(64, 96)] and torch.equal(parts[64, 96], vector[:32])
    assert wire.bytes_sent == 2 * 64 * 4 and wire.all_gather(vector) is vector and wire.bytes_all_gathered == 64 * 4
    total = wire.all_reduce_columns(torch.stack([vector, vector]), lambda rows, add_up: rows.mean(0))
    assert total.shape == (64,) and wire.bytes_held == 3 * 32 * 4
    assert wire.bytes_sent == 2 * 64 * 4 + (3 + 2) * 32 * 4


# Memory


def test_growth_is_what_was_held_at_once():
    """256 MiB together, of pieces that each are a mapping: not what was held before, nor what is given back."""
    piece = 2**24  # numbers, 64 MiB
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
