"""Names of jobs, and values as overrides: readable, safe, and the same at every start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from trainer.commands.sweep.job import MAX_NAME_LENGTH, assign, job_name, make_job
from trainer.loggers import higher_is_better

texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@given(st.lists(texts, max_size=4))
def test_a_name_is_safe_as_a_file_name(overrides: list[str]) -> None:
    name = job_name(overrides)
    assert name and len(name) <= MAX_NAME_LENGTH and Path(name).name == name and name.isascii()
    assert name[0] not in ".-" or (name.startswith("-") and len(name) == 9)
    assert name == job_name(overrides)


@given(st.lists(st.lists(st.from_regex(r"[a-z.]+=[ -~]{1,40}", fullmatch=True), max_size=3), max_size=5))
def test_other_overrides_have_another_name(jobs: list[list[str]]) -> None:
    assert len({job_name(overrides) for overrides in jobs}) == len({",".join(overrides) for overrides in jobs})


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["optimizer.lr=0.1", "seed=2"], "optimizer.lr=0.1,seed=2"),
        (["+model.width=8"], "+model.width=8"),
        (["silos=[3,1]"], "silos=3,1-af90073c"),
        (["data.path='a/b c'"], "data.path=a-bc-"),
        ([f"name={'x' * 200}"], f"name={'x' * (MAX_NAME_LENGTH - 14)}-"),
        ([], "run"),
    ],
)
def test_a_name_says_what_the_job_sets(overrides: list[str], name: str) -> None:
    assert job_name(overrides).startswith(name)


def test_a_name_holds_what_the_sweep_varies() -> None:
    """Settings that all jobs share, such as rounds or the folder, do not change the name."""
    overrides = ["rounds=5", "seed=1", "run_dir=elsewhere", "optimizer.lr=0.1"]
    job = make_job(overrides, Path("sweep"), constant=["rounds"])
    assert job.folder == Path("sweep/seed=1,optimizer.lr=0.1")
    assert job.arguments == ["rounds=5", "seed=1", "optimizer.lr=0.1", 'run_dir="sweep/seed=1,optimizer.lr=0.1"']


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc",), exclude_characters="$"), min_size=1))
def test_hydra_reads_the_text_that_was_assigned(text: str) -> None:
    assert OverridesParser.create().parse_override(assign("key", text)).value() == text


@pytest.mark.parametrize("name", ["test/accuracy", "validation/accuracy", "examples_per_second", "test/f1"])
def test_of_these_more_is_better(name: str) -> None:
    assert higher_is_better(name)


@pytest.mark.parametrize("name", ["test/loss", "test/perplexity", "seconds"])
def test_of_these_less_is_better(name: str) -> None:
    assert not higher_is_better(name)
