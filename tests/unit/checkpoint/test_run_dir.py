"""Starts of a run are counted from the first on, until a checkpoint is saved."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.run_dir import RunDir


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
