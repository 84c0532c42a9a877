"""The folder of a model: versions appear whole, by number, and what is not an exporter's is left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.export.model_folder import check_model_folder, newest_version, write_version
from trainer.service.version import ONNX, ModelDescription, TensorSpec, read_version, version_numbers

DESCRIPTION = ModelDescription(
    inputs=[TensorSpec("inputs", "FP32", [-1, 1, 8, 8])],
    outputs=[
        TensorSpec("outputs", "FP32", [-1, 2]),
        TensorSpec("scores", "FP32", [-1, 2]),
        TensorSpec("label", "INT64", [-1]),
    ],
    task="classification",
    headline="",
    sha256={},
    label_names=["cat", "dog"],
)


def fill(folder: Path) -> ModelDescription:
    (folder / ONNX).write_bytes(os.urandom(1000))
    (folder / "huggingface").mkdir()
    (folder / "huggingface/config.json").write_text("{}")
    return DESCRIPTION


def slow_fill(folder: Path) -> ModelDescription:
    for index in range(20):
        (folder / f"part-{index}").write_bytes(os.urandom(1000))
        time.sleep(0.001)
    return fill(folder)


def write_some(models: Path) -> None:
    for _ in range(5):
        write_version(models, "digits", slow_fill)


def write_forever(models: Path) -> None:
    while True:
        write_version(models, "digits", slow_fill, keep=2)


def test_versions_count_up_and_are_whole(tmp_path: Path):
    assert [write_version(tmp_path, "digits", fill).name for _ in range(3)] == ["1", "2", "3"]
    model = tmp_path / "digits"
    for number in version_numbers(model):
        description = read_version(model / str(number))
        assert set(description.sha256) == {ONNX, "huggingface/config.json"}
        assert replace(description, sha256={}) == DESCRIPTION
    assert sorted(path.name for path in model.iterdir()) == ["1", "2", "3", "config.pbtxt", "labels.txt"]


def test_the_next_number_follows_the_largest(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    os.rename(tmp_path / "digits/1", tmp_path / "digits/41")
    assert write_version(tmp_path, "digits", fill).name == "42"


def test_the_oldest_beyond_keep_are_removed(tmp_path: Path):
    for _ in range(5):
        write_version(tmp_path, "digits", fill, keep=3)
    assert version_numbers(tmp_path / "digits") == [3, 4, 5]
    assert not list((tmp_path / "digits").glob(".*"))


def test_triton_finds_its_configuration(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    assert (tmp_path / "digits/labels.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "digits/config.pbtxt").read_text() == (
        'name: "digits"\n'
        'backend: "onnxruntime"\n'
        "max_batch_size: 64\n"
        "dynamic_batching { }\n"
        "input [\n"
        '  { name: "inputs", data_type: TYPE_FP32, dims: [ 1, 8, 8 ] }\n'
        "]\n"
        "output [\n"
        '  { name: "outputs", data_type: TYPE_FP32, dims: [ 2 ] },\n'
        '  { name: "scores", data_type: TYPE_FP32, dims: [ 2 ], label_filename: "labels.txt" },\n'
        '  { name: "label", data_type: TYPE_INT64, dims: [ 1 ], reshape: { shape: [ ] } }\n'
        "]\n"
    )


def test_a_failure_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> ModelDescription:
        fill(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_version(tmp_path, "digits", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../digits", "a/b", ".hidden", "ä", "x" * 101])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="--name"):
        check_model_folder(tmp_path, name)


@pytest.mark.parametrize("foreign", ["notes.txt", "7/model.onnx", "src/a.py"])
def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, foreign: str):
    path = tmp_path / "digits" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="not the folder of an exported model: nothing was written"):
        write_version(tmp_path, "digits", fill)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


def test_other_inputs_than_those_of_the_versions_are_refused(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    other = [TensorSpec("inputs", "FP32", [-1, 3, 32, 32])]

    def fill_other(folder: Path) -> ModelDescription:
        return replace(fill(folder), inputs=other)

    with pytest.raises(ValueError, match=r"inputs inputs FP32 \[-1, 3, 32, 32\].*its clients would fail"):
        write_version(tmp_path, "digits", fill_other)
    assert version_numbers(tmp_path / "digits") == [1]


def test_a_damaged_version_is_passed_over(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    second = write_version(tmp_path, "digits", fill)
    (second / ONNX).write_bytes(b"other")
    found = newest_version(tmp_path / "digits")
    assert found and found[0].name == "1"


def test_of_two_writers_at_once_each_has_a_number(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert version_numbers(tmp_path / "digits") == [*range(1, 17)]
    for number in range(1, 17):
        read_version(tmp_path / "digits" / str(number))


@pytest.mark.parametrize("moments", [6, pytest.param(50, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_leaves_no_half_version(tmp_path: Path, moments: int):
    """Killed while it writes, renames and removes: whatever is a version is a whole one, also for the next writer."""
    model = tmp_path / "digits"
    context = multiprocessing.get_context("fork")
    for moment in range(moments):
        writer = context.Process(target=write_forever, args=(tmp_path,))
        writer.start()
        deadline = time.monotonic() + 0.1 + 0.3 * moment / moments
        while time.monotonic() < deadline:
            for number in version_numbers(model) if model.is_dir() else []:
                if (model / str(number)).is_dir():
                    check_whole(model, number)
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for number in version_numbers(model) if model.is_dir() else []:
            read_version(model / str(number))
    assert write_version(tmp_path, "digits", fill, keep=2)
    assert len(version_numbers(model)) == 2


def check_whole(model: Path, number: int) -> None:
    """Read a version, which may be removed meanwhile, as a whole."""
    try:
        read_version(model / str(number))
    except ValueError:
        assert not (model / str(number)).exists()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path):
    write_version(tmp_path, "digits", fill)
    leftover = tmp_path / "digits/.2-0123abcd"
    leftover.mkdir()
    (leftover / ONNX).write_bytes(b"half")
    os.utime(leftover, (0, 0))
    write_version(tmp_path, "digits", fill)
    assert not leftover.exists()
