"""The end of a run: the result is out before anything that others have written may fail."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import fedavg, make_run
from trainer.checkpoint import newest_complete
from trainer.distributed.topology import distributed
from trainer.loggers import FinalArtifacts, Metrics
from trainer.loop import fit as fit_module
from trainer.loop.checkpointing import make_checkpointer
from trainer.loop.fit import Result, fit


class Offline:
    """A logger whose server cannot be reached at the end."""

    def log_round(self, metrics: Metrics) -> None:
        pass

    def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
        raise ConnectionError("no network")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fails", ["logger", "artifacts"])
def test_the_result_is_out_before_others_may_fail(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Result] = []

    def take(result: Result) -> None:
        saved = newest_complete(tmp_path)
        assert saved and saved.folder.name == "round-000002"
        results.append(result)

    def break_down(state: object) -> FinalArtifacts:
        raise ConnectionError("no picture")

    if fails == "artifacts":
        monkeypatch.setattr(fit_module, "make_artifacts", break_down)
    with distributed() as topology:
        run = make_run(topology, [16], rounds=2)
        with pytest.raises(ConnectionError):
            fit(run, [Offline()], make_checkpointer(run, tmp_path), on_end=take)
        assert fit(run, until=1, on_end=take).metrics["round"] == 1, "which is not the end"
    assert [result.metrics["round"] for result in results] == [2]


def found_at_the_end(folder: Path) -> str:
    """Return the newest checkpoint that a rank finds at the end, when rank 1 is slow to write."""
    found: list[str] = []

    def take(result: Result) -> None:
        saved = newest_complete(folder)
        found.append(saved.folder.name if saved else "none")

    with distributed() as topology:
        run = make_run(topology, [16, 16], algorithm=fedavg())
        before_save = partial(time.sleep, topology.rank)
        fit(run, checkpointer=make_checkpointer(run, folder, before_save=before_save), on_end=take)
    return found[0]


def test_the_last_checkpoint_is_complete_on_all_ranks_before_the_result(ranks, tmp_path: Path) -> None:
    assert ranks(2).run(found_at_the_end, tmp_path) == ["round-000001"] * 2


def test_checkpoints_are_for_their_owner_alone(tmp_path: Path) -> None:
    """They hold states of clients."""
    with distributed() as topology:
        run = make_run(topology, [16])
        fit(run, checkpointer=make_checkpointer(run, tmp_path / "checkpoints"))
    (saved,) = (tmp_path / "checkpoints").rglob("*.safetensors")
    assert (tmp_path / "checkpoints").stat().st_mode & 0o777 == 0o700
    assert saved.stat().st_mode & 0o777 == 0o600


def test_what_a_checkpoint_counts_is_on_the_disk_before_it(tmp_path: Path) -> None:
    """When the metrics are synced, the checkpoint of their round is not complete yet."""
    logged: list[int] = []
    synced: list[tuple[int, int]] = []

    class Counter(Offline):
        def log_round(self, metrics: Metrics) -> None:
            logged.append(int(metrics["round"]))

        def finalize(self, result: dict[str, Any], artifacts: FinalArtifacts) -> None:
            pass

    def sync() -> None:
        newest = newest_complete(tmp_path)
        synced.append((logged[-1], int(newest.folder.name.split("-")[1]) if newest else 0))

    with distributed() as topology:
        run = make_run(topology, [16], rounds=3)
        fit(run, [Counter()], make_checkpointer(run, tmp_path, before_save=sync))
    assert [count for _, count in synced] == [0, 1, 2]
    assert all(round > count for round, count in synced)
