"""The small files of a run folder: damage and full disks are named, starts are counted, and nobody else may read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.disk import fill_disk
from tests.support.folders import composed_tree
from trainer.checkpoint import run_dir
from trainer.checkpoint.run_dir import RunDir
from trainer.loggers import JsonLinesLogger, Logger, TensorBoardLogger, read_jsonl
from trainer.utils.disk import DiskError

EXT4_SHUTDOWN, WITHOUT_FLUSHING = 0x8004587D, 2  # of linux/ext4.h


def tree_of(path: Path, **other: Any) -> dict[str, Any]:
    """Return a configuration with this run folder."""
    return {**composed_tree(()), "run_dir": str(path), **other}


def begun(path: Path) -> RunDir:
    """Return the folder of a run that has finished."""
    folder = RunDir(path)
    folder.create_or_check(tree_of(path))
    folder.lock.release()
    folder.set_status("finished")
    folder.write_result({"round": 20, "test/accuracy": 0.9})
    return folder


def read_all(folder: RunDir) -> None:
    """Read what a launch reads."""
    folder.has_finished(20)
    folder.check(tree_of(folder.path))


DAMAGE = [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe{}", b'{"status": "finish'[:9]]


@pytest.mark.parametrize("content", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", "result.json", "config.yaml"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes) -> None:
    folder = begun(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} is damaged: .*\n  restore it from a copy, or ") as raised:
        read_all(folder)
    assert "Error" not in str(raised.value)


def test_a_state_or_a_result_of_other_things_is_damaged(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    for name, content in (
        ("result.json", {"test/accuracy": 1.0}),
        ("state.json", {"status": "fini"}),
        ("state.json", {}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{tmp_path / name} is damaged"):
            folder.has_finished(20)


def test_a_result_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (tmp_path / "result.json").unlink()
    assert not folder.has_finished(20)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_configuration_that_was_cut_off_is_not_called_another(tmp_path: Path, part: float) -> None:
    """Half a YAML file is YAML, too: its other keys are not changes of the user."""
    folder = begun(tmp_path)
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(lines[: int(part * len(lines))]))
    with pytest.raises(ValueError, match=r"config\.yaml is cut off") as raised:
        folder.check(tree_of(tmp_path))
    assert "but the run in this folder has" not in str(raised.value)


def test_a_damaged_count_of_starts_is_named(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (tmp_path / "logs").mkdir()
    assert folder.count_start(0) == 1 and folder.count_start(1) == 2
    (tmp_path / "logs/starts.json").write_text("[")
    with pytest.raises(ValueError, match=r"starts\.json is damaged"):
        folder.count_start(2)


# Starts


def test_starts_that_find_the_same_checkpoints_are_counted(tmp_path: Path) -> None:
    """A round checkpoint or a mid-round one is progress; a new launch begins to count anew."""
    folder = RunDir(tmp_path)
    (tmp_path / "logs").mkdir()
    assert [folder.count_start(restarts) for restarts in range(3)] == [1, 2, 3]
    assert folder.newest_checkpoint() == "the beginning"
    (folder.checkpoints / "round-000000/silo-1-3f0a9c1e/step-000400").mkdir(parents=True)
    assert [folder.count_start(restarts) for restarts in (3, 4)] == [1, 2]
    assert folder.newest_checkpoint() == "round-000000/silo-1-3f0a9c1e/step-000400"
    (folder.checkpoints / "round-000001").mkdir()
    assert [folder.count_start(restarts) for restarts in (5, 6, 0)] == [1, 2, 1]
    assert folder.newest_checkpoint() == "round-000001"


# Whose it is


def test_a_new_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    begun(tmp_path / "outputs/run")
    assert (tmp_path / "outputs/run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "outputs").stat().st_mode & 0o077, "others have runs in it, too"


def test_two_runs_do_not_begin_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that finds the lock of another changes nothing, and does not take its folder for a foreign one."""
    tree, folder = tree_of(tmp_path), RunDir(tmp_path)
    folder.acquire()
    lock = (tmp_path / "lock.json").read_text()

    def busy() -> None:
        raise ValueError("in use")

    other = RunDir(tmp_path)
    monkeypatch.setattr(other.lock, "acquire", busy)
    assert other.is_in_use()
    with pytest.raises(ValueError, match="in use"):
        other.create_or_check(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
    assert (tmp_path / "lock.json").read_text() == lock
    folder.lock.release()


def test_a_refused_folder_keeps_no_lock(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ValueError, match="seed=1"):
        RunDir(tmp_path).create_or_check(tree_of(tmp_path, seed=1))
    assert not (tmp_path / "lock.json").exists()


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    begun(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    folder = RunDir(tmp_path / "there")
    folder.check(tree_of(tmp_path / "there"))
    assert folder.has_finished(20)


def test_every_writing_of_the_state_is_another_version(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    versions = [folder.state_version()]
    for _ in range(3):
        folder.set_status("crashed", error="always the same")
        versions.append(folder.state_version())
    assert len(set(versions)) == 4


# Disks that cannot be written to


def test_the_status_is_written_on_a_full_disk(mounted: Callable[[str], Path]) -> None:
    """The file is overwritten in its place. What does not fit there is an error, and the old status stays."""
    folder = RunDir(mounted("size=64k"))
    folder.set_running()
    fill_disk(folder.path)
    folder.set_status("crashed", error="the disk is full")
    assert folder.state() == {"status": "crashed", "error": "the disk is full"}
    with pytest.raises(
        DiskError, match=rf"the disk of {folder.path}/state.json is full \(0 bytes are free\).*\n  make room"
    ):
        folder.set_status("crashed", error="x" * 5000)
    assert folder.state() == {"status": "crashed", "error": "the disk is full"}
    assert {path.name for path in folder.path.iterdir()} == {"state.json", "other"}


WRITES: dict[str, Callable[[RunDir], Any]] = {
    "lock": lambda folder: folder.acquire(),
    "config": lambda folder: folder.write_config({"seed": 0}),
    "result": lambda folder: folder.write_result({"round": 1}),
    "log": lambda folder: folder.start_log(0),
    "status": lambda folder: folder.set_status("running"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_read_only_disk_is_named_by_every_write(
    mounted: Callable[[str], Path], write: Callable[[RunDir], Any]
) -> None:
    folder = RunDir(mounted("size=1m,ro"))
    with pytest.raises(DiskError, match=rf"the disk of {folder.path}.* is read-only: .*\n  make it writable") as raised:
        write(folder)
    assert raised.value.errno == errno.EROFS
    assert folder.claim_failure("run"), "without a disk each rank speaks for itself"


def test_the_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user of the tests may read everything."""
    begun(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=rf"run_dir={tmp_path} cannot be read: Permission denied"):
        RunDir(tmp_path).check(tree_of(tmp_path))


def test_metrics_are_on_the_disk_before_a_checkpoint_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(run_dir, "sync", synced.append)
    for name in ("metrics.jsonl", "tensorboard/events", "tensorboard-clients/events", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    RunDir(tmp_path).sync_metrics()
    names = {
        "metrics.jsonl",
        "tensorboard",
        "tensorboard/events",
        "tensorboard-clients",
        "tensorboard-clients/events",
        ".",
    }
    assert {str(path.relative_to(tmp_path)) for path in synced} == names


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Mount a file system on a disk, and return its folder and what takes the power from it and mounts it again."""
    image, place = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(1 << 24))
    place.mkdir()
    for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(place)]):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"{command[0]} is not permitted: {done.stderr.decode().strip()}")

    def lose_power() -> None:
        descriptor = os.open(place, os.O_RDONLY)
        fcntl.ioctl(descriptor, EXT4_SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING))
        os.close(descriptor)
        subprocess.run(["umount", str(place)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)

    try:
        yield place, lose_power
    finally:
        subprocess.run(["umount", str(place)], check=False)


def test_rounds_that_a_checkpoint_counts_outlive_a_loss_of_power(ext4: tuple[Path, Callable[[], None]]) -> None:
    """The third round is logged, and not counted yet."""
    place, lose_power = ext4
    folder = RunDir(place / "run")
    folder.acquire()
    loggers: list[Logger] = [JsonLinesLogger(folder.metrics), TensorBoardLogger(folder.tensorboard, {})]
    for index in (1, 2, 3):
        for logger in loggers:
            logger.log_round({"round": index, "train/loss": 0.5})
        if index == 2:
            folder.sync_metrics()
    for logger in loggers:
        logger.close()
    folder.lock.release()
    lose_power()
    assert [metrics["round"] for metrics in read_jsonl(folder.metrics)][:2] == [1, 2]
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("train/loss")][:2] == [1, 2]
