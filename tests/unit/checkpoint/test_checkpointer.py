"""Checkpoints: replicas divide and merge them, and a run resumes from the newest undamaged ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import get_native_id

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.disk import (
    LAYOUT,
    assert_trees_equal,
    mid_round_name,
    round_name,
    save_round,
    steps_of,
    writers,
)
from trainer.checkpoint import Checkpointer, ResumePoint, checkpointer, newest_complete
from trainer.checkpoint.checkpointer import assign_leaves
from trainer.checkpoint.format import SavedState, Shard, find_saved, iter_leaves, write_shard
from trainer.checkpoint.resume import local_inventory, round_folders, select_newest
from trainer.distributed.topology import distributed

laws = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = (2, 1)  # of the silos that save


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """This process is a world of one rank."""
    with distributed():
        yield


leaf = st.builds(torch.zeros, st.integers(0, 300)) | st.integers()
trees = st.dictionaries(
    st.text("abcd", min_size=1), leaf | st.dictionaries(st.text("abcd", min_size=1), leaf), max_size=9
)


@laws
@given(trees, st.integers(1, 5))
def test_replicas_divide_what_they_hold_in_common(tree: dict, replicas: int):
    """Every leaf is written exactly once; no replica writes more than another by more than the largest leaf."""
    shares = [assign_leaves(tree, replica, replicas) for replica in range(replicas)]
    assert sorted(name for share in shares for name in share) == sorted(name for name, _ in iter_leaves(tree))
    assert all(share[name] is leaf for share in shares for name, leaf in iter_leaves(tree) if name in share)
    loads = [
        sum(leaf.nbytes + 1 if isinstance(leaf, torch.Tensor) else 1 for leaf in share.values()) for share in shares
    ]
    largest = max((leaf.nbytes for _, leaf in iter_leaves(tree) if isinstance(leaf, torch.Tensor)), default=0)
    assert max(loads) - min(loads) <= largest + 1


@settings(laws, max_examples=25)
@given(trees, st.integers(1, 3))
def test_what_replicas_wrote_is_merged(tmp_path_factory: pytest.TempPathFactory, tree: dict, replicas: int):
    """The result is the tree of all of them; own tensors stay separate."""
    folder = tmp_path_factory.mktemp("merged")
    ranks = writers(folder, (replicas,))
    for replica, one in enumerate(ranks):
        one.save_mid_round(1, 5, {"model": tree, "empty": {}}, {}, {"replica": replica})
        one.wait()
    saved = find_saved(folder / mid_round_name(0, 1, 5))
    assert saved is not None and not saved.errors()
    assert_trees_equal(saved.load("model"), tree)
    assert saved.load("empty") == {}
    assert [saved.load_shard(part, "own") for part in saved.shards] == [
        {"replica": replica} for replica in range(replicas)
    ]


def test_all_silos_write_or_the_first_alone(tmp_path: Path):
    """If clients have no state, the other silos write nothing."""
    for name, all_write in (("round-000001", True), ("round-000002", False)):
        for one in writers(tmp_path, SIZES):
            clients = {"clients": {str(one.topology.silo): {"a": 1}}}
            one.save_round(name, {"model": {"a": 1}}, {}, clients, {}, {}, all_write)
            one.wait()
    every, first = (find_saved(path) for path in round_folders(tmp_path))
    assert every is not None and first is not None
    assert every.shards == ("silo-0.replica-0", "silo-0.replica-1", "silo-1.replica-0")
    assert first.shards == ("silo-0.replica-0", "silo-0.replica-1")
    assert set(first.load("clients")) == {"0"} and set(every.load("clients")) == {"0", "1"}
    assert [len(every.load_shard(part, "part-0/model")) for part in every.shards] == [1, 0, 0]


def test_what_is_loaded_is_not_what_is_on_disk(tmp_path: Path):
    """There are no aliases: training changes neither the file nor what is loaded from it again."""
    save_round(writers(tmp_path), 1)
    saved = newest_complete(tmp_path)
    assert saved is not None
    saved.load("model")["weight"].zero_()
    assert saved.errors() == [] and saved.load("model")["weight"].tolist() == [1] * 4


def test_nothing_is_no_checkpoint(tmp_path: Path):
    assert writers(tmp_path)[0].latest() is None
    assert newest_complete(tmp_path / "nowhere") is None


def test_borders_are_in_the_order_of_the_run(tmp_path: Path):
    """They are sorted by number, not by letter; an unevaluated round comes before the same one evaluated."""
    names = ["round-000009", "round-000010-unevaluated", "round-000010", "round-999999", "round-1000000"]
    for name in [*reversed(names), "rounds", "round-1", "round-000001.old"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in round_folders(tmp_path)] == names


def test_where_a_run_stands_is_said(tmp_path: Path):
    section = SavedState(tmp_path / "step-000400", ())
    assert ResumePoint(3, SavedState(tmp_path / "round-000003", ())).description == "round 3"
    assert (
        ResumePoint(3, None, {1: section, 0: section}).description
        == "round 3, silo 0 at step-000400, silo 1 at step-000400"
    )


def test_the_figures_of_a_round_are_reported_when_it_is_evaluated(tmp_path: Path):
    assert ResumePoint(3, SavedState(tmp_path / round_name(3), ())).logged_rounds == 3
    assert ResumePoint(3, SavedState(tmp_path / round_name(3, False), ())).logged_rounds == 2
    assert ResumePoint(3, None, {0: SavedState(tmp_path / mid_round_name(0, 3, 1), ())}).logged_rounds == 3


SILOS = (f"silo-0-{LAYOUT}", f"silo-1-{LAYOUT}")
PLACES = (round_name(1), round_name(2, False), round_name(2), round_name(3))
STEPS = ("step-000009", "step-000010", "step-000200")

amounts = st.sampled_from(["none", "half", "whole", "whole"])
kept = st.fixed_dictionaries({place: amounts for place in PLACES})
kept_sections = st.dictionaries(
    st.tuples(st.sampled_from(PLACES), st.sampled_from([*SILOS, "silo-1-another0"]), st.sampled_from(STEPS)), amounts
)


def put(folder: Path, amount: str) -> None:
    """Write all parts of a checkpoint, half of them, or none."""
    for part in {"none": "", "half": "a", "whole": "ab"}[amount]:
        write_shard(folder, Shard(part, ("a", "b"), "first"), {})


def chosen(folder: Path, passed: list[str]) -> list[str]:
    names = [path.name for path in reversed(round_folders(folder))]
    start = select_newest(folder, names, lambda name: local_inventory(folder / name, SILOS, passed), passed)
    return [str(saved.folder.relative_to(folder)) for saved in start.states] if start else []


@settings(laws, max_examples=60)
@given(kept, kept_sections)
def test_the_newest_is_chosen(
    tmp_path_factory: pytest.TempPathFactory, kept: dict[str, str], sections: dict[tuple[str, str, str], str]
):
    """A round checkpoint is chosen if it is complete, or if all silos have saved inside its round.

    With it come the newest mid-round checkpoints of the silos. Newer ones that are incomplete are reported.
    """
    folder = tmp_path_factory.mktemp("choice")
    for place, amount in {**kept, **{"/".join(key): amount for key, amount in sections.items()}}.items():
        put(folder / place, amount)
    usable: dict[str, list[str]] = {}
    for place in PLACES:
        whole = {silo: [step for step in STEPS if sections.get((place, silo, step)) == "whole"] for silo in SILOS}
        newest = [f"{place}/{silo}/{steps[-1]}" for silo, steps in whole.items() if steps]
        if kept[place] == "whole" or len(newest) == len(SILOS):
            usable[place] = [place] * (kept[place] == "whole") + newest
    expected = list(usable)[-1:]
    passed: list[str] = []
    assert chosen(folder, passed) == (usable[expected[0]] if expected else [])
    newer = [path for path in PLACES[PLACES.index(expected[0]) + 1 if expected else 0 :] if (folder / path).exists()]
    assert passed == [f"{folder / path} is not whole" for path in reversed(newer)]


TWO = {place: [place, *(f"{place}/{silo}/{STEPS[0]}" for silo in SILOS)] for place in (round_name(1), round_name(2))}


@pytest.fixture
def two_rounds(tmp_path: Path) -> Path:
    """Write two round checkpoints, and inside the round after each a mid-round checkpoint of every silo."""
    for name in chain(*TWO.values()):
        put(tmp_path / name, "whole")
    return tmp_path


@laws
@given(st.sets(st.sampled_from([*chain(*TWO.values())])))
def test_what_is_known_to_be_damaged_is_not_chosen(two_rounds: Path, damaged: set[str]):
    """Damage to a round checkpoint leaves its mid-round checkpoints in use, and the other way round."""
    passed = [f"{two_rounds / name / 'b.safetensors'} is damaged" for name in damaged]
    left = {place: [name for name in names if name not in damaged] for place, names in TWO.items()}
    usable = [names for place, names in left.items() if place in names or len(names) == len(SILOS)]
    assert chosen(two_rounds, passed) == (usable[-1] if usable else [])


def test_steps_are_compared_as_numbers(tmp_path: Path):
    """In a long round the millionth step comes after the one before."""
    for step in (999_999, 1_000_000):
        for silo in SILOS:
            put(tmp_path / round_name(0) / silo / f"step-{step:06d}", "whole")
    assert chosen(tmp_path, []) == [f"{round_name(0)}/{silo}/step-1000000" for silo in SILOS]


def save_together(folder: Path) -> None:
    """Save a round checkpoint in two silos, and a mid-round checkpoint of each."""
    with distributed(2) as topology:
        mine = Checkpointer(folder, topology, lambda rounds: LAYOUT)
        mine.save_round(
            round_name(1), {}, {}, {"silo": {str(topology.silo): topology.rank}}, {}, {}, all_ranks_write=True
        )
        mine.save_mid_round(1, 10 + topology.silo, {"silo": topology.silo}, {}, {})
        mine.wait()


def go_on_together(folder: Path) -> tuple[tuple, tuple[str, ...]] | str:
    """Return the checkpoints from which these ranks resume, and those they passed over; or the error."""
    with distributed(2) as topology:
        try:
            start = Checkpointer(folder, topology, lambda rounds: LAYOUT).latest()
        except ValueError as error:
            return str(error)
        return (steps_of(start), start.rejected) if start else "nothing"


def test_a_checkpoint_is_of_all_ranks(ranks, tmp_path: Path):
    ranks(2).run(save_together, tmp_path)
    saved = newest_complete(tmp_path)
    assert saved is not None and saved.load("silo") == {"0": 0, "1": 1}
    assert ranks(2).run(go_on_together, tmp_path) == [((round_name(1), {0: 10, 1: 11}), ())] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_finds_all_know(ranks, tmp_path: Path, rank: int):
    """Any rank may read the damaged part; if nothing is left, all raise the same error."""
    ranks(2).run(save_together, tmp_path)
    damaged = tmp_path / mid_round_name(rank, 1, 10 + rank) / "replica-0.safetensors"
    damaged.write_bytes(b"")
    (one, passed), other = ranks(2).run(go_on_together, tmp_path)
    assert (one, passed) == other and one == (round_name(1), {1 - rank: 11 - rank})
    assert len(passed) == 1 and str(damaged) in passed[0]
    (tmp_path / round_name(1) / f"silo-{rank}.replica-0.safetensors").unlink()
    raised = ranks(2).run(go_on_together, tmp_path)
    assert raised[0] == raised[1] and "run_dir" in raised[0] and str(damaged) in raised[0]


def test_all_ranks_know_what_is_not_whole(ranks, tmp_path: Path):
    """Rank 0 searches for complete checkpoints, and all follow it: here to the first round checkpoint."""
    ranks(2).run(save_together, tmp_path)
    save_round(writers(tmp_path, (1, 1))[:1], 2)
    one, other = ranks(2).run(go_on_together, tmp_path)
    assert one == other == ((round_name(1), {0: 10, 1: 11}), (f"{tmp_path / round_name(2)} is not whole",))


def test_all_ranks_raise_or_none_does(ranks, tmp_path: Path):
    """There is only half a round checkpoint: if some ranks raised, the others would wait for them."""
    save_round(writers(tmp_path, (1, 1))[:1], 2)
    one, other = ranks(2).run(go_on_together, tmp_path)
    assert one == other


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_writing_thread_never_asks_for_a_higher_priority():
    """Regression: only root may have it, so a run under `nice -n 19` wrote no checkpoint."""

    def write() -> int:
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)
        checkpointer._lower_priority()
        return os.getpriority(os.PRIO_PROCESS, get_native_id())

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(write).result() == 19
