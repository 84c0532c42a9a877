"""The values of a sweep stand for the jobs that Hydra's sweeper makes of them."""

from __future__ import annotations

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from trainer.commands.sweep import grid

SWEEPS = [
    ["seed=1,2,3", "optimizer.lr=0.1,0.03"],
    ["seed=range(0,6,2)", "algorithm=choice(sync,fedavg)", "rounds=1"],
    ["algorithm=glob(fed*)", "silos=[1,1],2"],
    ["seed=1,2", "seed=3"],
    ["name='a b',c", "+model.width=8"],
    [],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_the_jobs_are_those_of_hydras_sweeper(overrides: list[str]) -> None:
    parsed = grid.parse(overrides)
    (theirs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [list(job) for job in grid.product(parsed)] == theirs


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_the_edges_hold_every_value(overrides: list[str]) -> None:
    """There are no more combinations than values in the longest list, and each is one of the jobs."""
    parsed = grid.parse(overrides)
    jobs, edges = grid.product(parsed), grid.edges(parsed)
    assert {value for job in edges for value in job} == {value for job in jobs for value in job}
    assert len(edges) == max(map(len, map(grid.values, parsed)), default=1)
    assert set(edges) <= set(jobs)


def test_of_an_interval_the_ends_are_tried() -> None:
    assert grid.edges(grid.parse(["optimizer.lr=interval(0.01,0.3)"])) == [
        ("optimizer.lr=0.01",),
        ("optimizer.lr=0.3",),
    ]
