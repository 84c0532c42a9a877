"""Trees on disk: they round-trip, are complete or absent, and damage is detected."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support.disk import assert_trees_equal, content, flipped
from trainer.checkpoint import direct_io
from trainer.checkpoint import format as checkpoint_format
from trainer.checkpoint.format import (
    DTYPES,
    SavedState,
    Shard,
    find_saved,
    iter_leaves,
    part_name,
    unflatten,
    unsavable,
    write_shard,
    write_tensors,
    write_text,
)
from trainer.distributed.topology import distributed

laws = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PART = part_name(0)  # of a model that is held whole

TEXTS = ("a" * 60000, "b" * 50000)

names = st.text("abcdefgh.0123456789_/~é", min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).view(shape).to(dtype), shapes, st.sampled_from(list(DTYPES))
)
numbers = st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False) | st.booleans()
values = tensors | numbers | st.none() | st.text(max_size=5)
trees = st.recursive(
    st.dictionaries(names, values, max_size=4),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def write(folder: Path, tree: dict[str, Any]) -> SavedState:
    """Write a tree of one part."""
    write_shard(folder, Shard("a", ("a",), "first"), {PART: tree})
    saved = find_saved(folder)
    assert saved is not None and saved.errors() == []
    return saved


@laws
@given(trees)
def test_trees_go_round(tmp_path: Path, tree: dict[str, Any]):
    """Nested names, tensors of every type and shape, numbers, texts and null are read back unchanged.

    So are empty trees: an optimizer without a state yet is not a missing one.
    """
    assert_trees_equal(write(tmp_path, {"section": tree}).load("section"), tree)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_tensors_of_every_type_go_round(tmp_path: Path, dtype: torch.dtype):
    """Tensors without elements and without dimensions are included; NaN keeps its bits."""
    bits = torch.arange(256, dtype=torch.uint8) & (1 if dtype is torch.bool else 255)
    tree = {"all": bits.view(dtype), "none": torch.zeros(0, 3, dtype=dtype), "one": torch.ones((), dtype=dtype)}
    assert_trees_equal(write(tmp_path, {"section": tree}).load("section"), tree)


def test_tensors_are_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tensors may end with a block, inside one, or with its first byte; the safetensors library reads the file too."""
    monkeypatch.setattr(direct_io, "BLOCK_BYTES", 4096)
    tree = {str(size): torch.arange(size).to(torch.uint8) for size in (0, 1, 4095, 4096, 4097, 40960, 50001)}
    assert_trees_equal(write(tmp_path, {"section": tree}).load("section"), tree)
    assert_trees_equal(
        load_file(tmp_path / "a.safetensors"), {f"{PART}/section/{size}": leaf for size, leaf in tree.items()}
    )


def test_numbers_that_are_none_go_round(tmp_path: Path):
    loaded = write(tmp_path, {"section": {"nan": math.nan, "most": math.inf, "least": -math.inf}}).load("section")
    assert math.isnan(loaded["nan"]) and (loaded["most"], loaded["least"]) == (math.inf, -math.inf)


@laws
@given(trees)
def test_a_tree_is_its_leaves(tree: dict[str, Any]):
    assert_trees_equal(unflatten(dict(iter_leaves(tree))), tree)


def test_leaves_that_are_not_wanted_are_left_out(tmp_path: Path):
    """Tensors and numbers are chosen by their paths: client 1 is not client 11."""
    tree = {"1": {"a": torch.ones(1), "b": 2}, "11": {"a": torch.zeros(1), "b": 3}}
    saved = write(tmp_path, {"clients": tree})
    assert_trees_equal(saved.load("clients", lambda leaf: leaf.startswith("1/")), {"1": tree["1"]})
    assert_trees_equal(saved.load("clients", lambda leaf: leaf.endswith("/b")), {"1": {"b": 2}, "11": {"b": 3}})
    assert saved.load("clients", lambda leaf: False) == {}


def test_sections_are_told_apart(tmp_path: Path):
    """One name may begin like another; a section may be empty or missing."""
    saved = write(tmp_path, {"model": {"a": 1}, "model.old": {"b": 2}, "algorithm": {}})
    assert saved.load("model") == {"a": 1}
    assert saved.load("model.old") == {"b": 2}
    assert saved.load("algorithm") == saved.load("nothing") == {}


def test_a_view_is_saved_without_what_it_looks_into(tmp_path: Path):
    """One row of a megabyte, and a transposed part of another, make a small file with the right numbers."""
    tree = {"row": torch.arange(262144.0).view(-1, 4)[7], "turned": torch.arange(262144.0).view(-1, 4)[:3].T}
    saved = write(tmp_path, {"model": tree})
    assert (tmp_path / "a.safetensors").stat().st_size < 1000
    assert_trees_equal(saved.load("model"), tree)


def test_parts_are_merged(tmp_path: Path):
    """Divided leaves are one tree again; own leaves stay separate."""
    for name, value in (("a", 1), ("b", 2)):
        write_shard(
            tmp_path, Shard(name, ("a", "b"), "first"), {PART: {"model": {name: value}}, "own": {"value": value}}
        )
    saved = find_saved(tmp_path)
    assert saved is not None and saved.shards == ("a", "b")
    assert saved.load("model") == {"a": 1, "b": 2}
    assert [saved.load_shard(part, "own") for part in saved.shards] == [{"value": 1}, {"value": 2}]


three = ("a", "b", "c")
written = st.lists(st.tuples(st.sampled_from(three), st.sampled_from(["first", "second"])), max_size=8)


@laws
@given(written)
def test_a_whole_is_all_parts_of_one_attempt(tmp_path_factory: pytest.TempPathFactory, order: list[tuple[str, str]]):
    """Two attempts may write in any order, some over the other's files: parts never mix."""
    folder = tmp_path_factory.mktemp("whole")
    for name, attempt in order:
        write_shard(folder, Shard(name, three, attempt), {PART: {"section": {name: attempt}}})
    last, saved = dict(order), find_saved(folder)
    assert (saved is not None) == (set(last) == set(three) and len(set(last.values())) == 1)
    assert saved is None or saved.load("section") == last


def test_other_parts_in_the_folder_are_left_alone(tmp_path: Path):
    """A run of three replicas has stopped here half-way; one of two is complete without the third."""
    for name in ("a", "c"):
        write_shard(tmp_path, Shard(name, three, "first"), {PART: {"section": {name: 1}}})
    for name in ("b", "a"):
        assert find_saved(tmp_path) is None
        write_shard(tmp_path, Shard(name, ("a", "b"), "second"), {PART: {"section": {name: 2}}})
    saved = find_saved(tmp_path)
    assert saved is not None and saved.load("section") == {"a": 2, "b": 2}


@pytest.fixture
def saved(tmp_path: Path) -> SavedState:
    """A tree of two parts, to damage."""
    for name in ("a", "b"):
        tree = {"model": {name: torch.linspace(-1, 1, 20)}, "progress": {name: 3}}
        write_shard(tmp_path, Shard(name, ("a", "b"), "first"), {PART: tree})
    whole = find_saved(tmp_path)
    assert whole is not None
    return whole


def faults_of(folder: Path) -> list[str]:
    saved = find_saved(folder)
    return saved.errors() if saved else [f"{folder} is not whole"]


def test_without_a_note_it_is_not_whole(saved: SavedState):
    with content(saved.folder / "b.json", None):
        assert find_saved(saved.folder) is None
    assert faults_of(saved.folder) == []


def test_nothing_is_not_whole(tmp_path: Path):
    assert find_saved(tmp_path) is None
    assert find_saved(tmp_path / "nowhere") is None


def test_all_faults_are_said_at_once(saved: SavedState):
    """A missing file and a damaged one are both named; ranks that divide the check divide the errors."""
    (saved.folder / "a.safetensors").unlink()
    (saved.folder / "b.safetensors").write_bytes(b"")
    missing, damaged = saved.errors()
    assert str(saved.folder / "a.safetensors") in missing and "missing" in missing
    assert str(saved.folder / "b.safetensors") in damaged and "damaged" in damaged
    assert [saved.errors(share, 2) for share in range(2)] == [[missing], [damaged]]


@pytest.mark.parametrize("name", ["a.json", "b.json"])
def test_every_flipped_bit_of_a_note_is_noticed(saved: SavedState, name: str):
    """Each bit of the JSON file is flipped in turn, since a wrong one could lose a part silently."""
    own = (saved.folder / name).read_bytes()
    unnoticed = []
    for place in range(len(own)):
        for bit in range(8):
            with content(saved.folder / name, flipped(own, place, bit)):
                if not faults_of(saved.folder):
                    unnoticed.append((place, bit))
    assert not unnoticed


def test_every_truncation_of_a_note_is_noticed(saved: SavedState):
    own = (saved.folder / "a.json").read_bytes()
    for length in range(len(own)):
        with content(saved.folder / "a.json", own[:length]):
            assert faults_of(saved.folder), length


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A later version has written the tree."""
    with monkeypatch.context() as later:
        later.setattr(checkpoint_format, "FORMAT", checkpoint_format.FORMAT + 1)
        write(tmp_path, {"model": {"a": 1}})
    (fault,) = faults_of(tmp_path)
    assert str(tmp_path) in fault
    assert f"format {checkpoint_format.FORMAT + 1}" in fault and f"reads {checkpoint_format.FORMAT}" in fault


def test_a_note_comes_last(saved: SavedState, monkeypatch: pytest.MonkeyPatch):
    """A part that is interrupted after its tensors does not exist.

    The next attempt is incomplete too, and never mixed.
    """

    def stop(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_format, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shard(saved.folder, Shard("a", ("a", "b"), "second"), {PART: {"model": {"a": 5}}})
    assert faults_of(saved.folder)


def test_what_an_interrupted_write_left_is_harmless(tmp_path: Path):
    """The next write replaces it, whatever it is."""
    tmp_path.joinpath(".a.partial").write_bytes(b"half")
    assert find_saved(tmp_path) is None
    assert write(tmp_path, {"model": {"a": 1}}).load("model") == {"a": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.json"}


def test_named_tensors_are_one_file_that_others_can_read(tmp_path: Path):
    """It replaces the previous file; a view is written as its own values."""
    path = tmp_path / "model.safetensors"
    vector = torch.arange(6.0)
    write_tensors(path, {"old": vector})
    write_tensors(path, {"weight": vector.view(2, 3).T, "bias": torch.ones(2, dtype=torch.bfloat16)})
    expected = {"weight": vector.view(2, 3).T, "bias": torch.ones(2, dtype=torch.bfloat16)}
    assert_trees_equal(load_file(path), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_names_of_a_file_of_tensors_stay_as_they_are(tmp_path: Path):
    """In a module's ModuleDict a name may have a slash."""
    write_tensors(tmp_path / "model.safetensors", {"sites.a/b.weight": torch.ones(2), "~": torch.zeros(1)})
    assert set(load_file(tmp_path / "model.safetensors")) == {"sites.a/b.weight", "~"}


@pytest.mark.parametrize("view", ["conjugated", "negated", "transposed", "expanded"])
def test_views_are_saved_as_their_values(tmp_path: Path, view: str):
    """Their memory holds other bits, or in another order."""
    waves = torch.polar(torch.ones(2, 3), torch.arange(6.0).view(2, 3))
    tensor = {
        "conjugated": waves.conj(),
        "negated": waves.conj().imag,
        "transposed": waves.T,
        "expanded": waves.expand(2, 2, 3),
    }[view]
    assert torch.equal(write(tmp_path, {"section": {"tensor": tensor}}).load("section")["tensor"], tensor)


def test_what_cannot_be_saved_is_named():
    tensors = {
        "fine": torch.ones(1, dtype=torch.complex64),
        "wave": torch.ones(1, dtype=torch.complex128),
        "adjacency": torch.eye(2).to_sparse(),
        "_extra_state": {"version": 1},
    }
    expected = ["wave of torch.complex128", "adjacency of torch.sparse_coo", "_extra_state of dict"]
    assert unsavable(tensors) == expected


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """If the disk fails before the renaming, only the old text remains."""
    path = tmp_path / "best"
    write_text(path, "old")

    def stop(source: Path, target: Path) -> None:
        raise OSError("the machine stops")

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(OSError, match="stops"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_and_read(path: Path) -> set[str]:
    """Return all texts read while two processes write."""
    with distributed() as topology:
        seen = set()
        for _ in range(50):
            write_text(path, TEXTS[topology.rank])
            seen.add(path.read_text())
        return seen


def test_two_processes_write_the_same_text(ranks, tmp_path: Path):
    """Every reader sees one of the two texts complete, and no partial file remains."""
    seen = ranks(2).run(write_and_read, tmp_path / "state.json")
    assert seen[0] | seen[1] == set(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
