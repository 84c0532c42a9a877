"""Checkpoints: what goes in comes out, and what was damaged is noticed before any of it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import checkpoint
from trainer.checkpoint import Checkpoints, open_checkpoint, write_text
from trainer.topology import distributed

laws = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

names = st.text("abcdefgh.0123456789_", min_size=1, max_size=6)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(lambda shape, dtype: torch.arange(math.prod(shape)).view(shape).to(dtype), shapes, dtypes)
numbers = st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False) | st.booleans()
values = tensors | numbers | st.none() | st.text(max_size=5)
trees = st.recursive(
    st.dictionaries(names, values, max_size=4),
    lambda inner: st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """This process is all the ranks there are."""
    with distributed():
        yield


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, is_first=True, keep=keep)


def example() -> dict[str, dict[str, Any]]:
    """Sections as a run of two silos has them."""
    weights = torch.linspace(-1, 1, 40).view(5, 8)
    return {
        "model": {"weight": weights, "bias": torch.ones(3)},
        "progress": {"rounds": 3, "json": "{}"},
        "silo-0": {"2": {"optimizer": {"0": {"momentum_buffer": weights + 1}}}},
        "silo-1": {"3": {"optimizer": {"0": {"momentum_buffer": weights + 2}}}},
    }


def assert_trees_equal(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for name in theirs:
            assert_trees_equal(ours[name], theirs[name])
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    else:
        assert ours == theirs and type(ours) is type(theirs)


@laws
@given(trees)
def test_trees_go_round(tmp_path: Path, tree: dict[str, Any]):
    """Nested names, tensors of every type and shape, numbers, texts and null come back as they were.

    So do empty trees: an optimizer that has no state yet is not one that was forgotten.
    """
    checkpoints(tmp_path).save("round-000001", {"section": tree})
    assert_trees_equal(open_checkpoint(tmp_path / "round-000001").load("section"), tree)


def test_leaves_that_are_not_wanted_are_left_out(tmp_path: Path):
    """Tensors and numbers alike, chosen by their paths: client 1 is not client 11."""
    tree = {"1": {"a": torch.ones(1), "b": 2}, "11": {"a": torch.zeros(1), "b": 3}}
    checkpoints(tmp_path).save("round-000001", {"silo-0": tree})
    saved = open_checkpoint(tmp_path / "round-000001")
    assert_trees_equal(saved.load("silo-0", lambda leaf: leaf.startswith("1/")), {"1": tree["1"]})
    assert_trees_equal(saved.load("silo-0", lambda leaf: leaf.endswith("/b")), {"1": {"b": 2}, "11": {"b": 3}})
    assert saved.load("silo-0", lambda leaf: False) == {}


def test_an_empty_section_is_a_section(tmp_path: Path):
    checkpoints(tmp_path).save("round-000001", {"algorithm": {}})
    saved = open_checkpoint(tmp_path / "round-000001")
    assert saved.sections("") == ["algorithm"] and saved.load("algorithm") == {}


def test_a_view_is_saved_without_what_it_looks_into(tmp_path: Path):
    """One row of a megabyte, transposed: a small file, and the right numbers."""
    whole = torch.arange(262144.0).view(-1, 4)
    checkpoints(tmp_path).save("round-000001", {"model": {"row": whole[7], "turned": whole[:3].T}})
    folder = tmp_path / "round-000001"
    assert (folder / "model.safetensors").stat().st_size < 1000
    assert_trees_equal(open_checkpoint(folder).load("model"), {"row": whole[7], "turned": whole[:3].T})


def test_what_is_loaded_is_not_what_was_saved(tmp_path: Path):
    """No aliases: training on does not change what was read."""
    weight = torch.ones(3)
    checkpoints(tmp_path).save("round-000001", {"model": {"weight": weight}})
    loaded = open_checkpoint(tmp_path / "round-000001").load("model")["weight"]
    weight.zero_()
    assert torch.equal(loaded, torch.ones(3))


def test_only_the_newest_stay_and_latest_names_the_last(tmp_path: Path):
    mine = checkpoints(tmp_path, keep=2)
    assert mine.newest() is None
    for rounds in (1, 9, 10, 11):
        mine.save(f"round-{rounds:06d}", example())
        newest = mine.newest()
        assert newest is not None and newest.rounds == rounds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "round-000010", "round-000011"]


def test_saving_a_round_again_replaces_it(tmp_path: Path):
    mine = checkpoints(tmp_path)
    mine.save("round-000001", {"old": {"a": 1}, "model": {"a": 1}})
    mine.save("round-000001", {"model": {"a": 2}})
    newest = mine.newest()
    assert newest is not None
    assert newest.sections("") == ["model"] and newest.load("model") == {"a": 2}


def test_what_an_interrupted_save_left_is_harmless(tmp_path: Path):
    """Half a checkpoint beside a whole one: the whole one is the newest, and the next save writes over the half."""
    mine = checkpoints(tmp_path)
    mine.save("round-000001", example())
    partial = tmp_path / ".round-000002.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / "stranger.safetensors").write_bytes(b"of another run")
    newest = mine.newest()
    assert newest is not None and newest.rounds == 1
    mine.save("round-000002", example())
    newest = mine.newest()
    assert newest is not None and newest.rounds == 2
    assert sorted(path.name for path in newest.folder.iterdir()) == sorted(
        ["manifest.json", *(f"{section}.safetensors" for section in example())]
    )
    assert not partial.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to damage."""
    folder = tmp_path_factory.mktemp("saved")
    with distributed():
        checkpoints(folder).save("round-000001", example())
    return folder / "round-000001"


def noticed(folder: Path, name: str, content: bytes) -> bool:
    """Whether opening fails, as a fault of the file, when it has this content instead of its own."""
    path = folder / name
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        open_checkpoint(folder)
    except ValueError as error:
        return str(folder) in str(error)
    except KeyError:
        return False
    finally:
        path.write_bytes(original)
    return False


sections = st.sampled_from([f"{name}.safetensors" for name in example()])


@laws
@given(sections, st.data())
def test_every_flipped_bit_of_a_section_is_noticed(saved: Path, name: str, data: st.DataObject):
    content = bytearray((saved / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert noticed(saved, name, bytes(content))


@laws
@given(sections, st.data())
def test_every_truncation_and_every_addition_is_noticed(saved: Path, name: str, data: st.DataObject):
    content = (saved / name).read_bytes()
    assert noticed(saved, name, content[: data.draw(st.integers(0, len(content) - 1))])
    assert noticed(saved, name, content + data.draw(st.binary(min_size=1, max_size=9)))


def test_every_flipped_bit_of_the_manifest_is_noticed(saved: Path):
    """All of them, one after the other: a manifest that lies would lose a section in silence."""
    content = (saved / "manifest.json").read_bytes()
    unnoticed = []
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            if not noticed(saved, "manifest.json", bytes(damaged)):
                unnoticed.append((place, bytes(damaged[max(place - 12, 0) : place + 5])))
    assert not unnoticed


def test_every_truncation_of_the_manifest_is_noticed(saved: Path):
    content = (saved / "manifest.json").read_bytes()
    assert all(noticed(saved, "manifest.json", content[:length]) for length in range(len(content)))


def test_all_faults_are_said_at_once(tmp_path: Path):
    """A missing section and a damaged one, with the folder and the way out."""
    checkpoints(tmp_path).save("round-000001", example())
    folder = tmp_path / "round-000001"
    (folder / "model.safetensors").unlink()
    (folder / "silo-1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)round-000001.*model.*missing.*silo-1.*damaged.*run_dir"):
        open_checkpoint(folder)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole checkpoint that a later version has written."""
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        checkpoints(tmp_path).save("round-000001", example())
    with pytest.raises(ValueError, match=f"format {checkpoint.FORMAT + 1}.*reads {checkpoint.FORMAT}"):
        open_checkpoint(tmp_path / "round-000001")


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the machine stops before the renaming, the old text stands."""
    path = tmp_path / "latest"
    write_text(path, "old")

    def stop(source: Path, target: Path) -> None:
        raise OSError("the machine stops")

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(OSError, match="stops"):
        write_text(path, "new")
    assert path.read_text() == "old"


def save_together(folder: Path) -> list[str]:
    """Each rank brings a section of its own."""
    with distributed() as topology:
        mine = Checkpoints(folder, topology.rank == 0)
        mine.save("round-000001", {f"silo-{topology.rank}": {"rank": topology.rank}})
        newest = mine.newest()
        assert newest is not None
        return [newest.load(section)["rank"] for section in newest.sections("silo-")]


def test_a_checkpoint_is_of_all_ranks(ranks, tmp_path: Path):
    assert ranks(2).run(save_together, tmp_path) == [[0, 1], [0, 1]]
