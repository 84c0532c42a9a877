"""The example of each page of docs/coming-from/ runs as it is printed, on two ranks."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.cli.command import ROOT, work
from tests.docs.example import Example

PAGES = ROOT / "docs/coming-from"
# Rounds, and the least test accuracy; of a language model the largest perplexity of its 256 bytes.
RESULTS = {
    "flower": (10, "test/accuracy", 0.2, 1),
    "hugging-face": (3, "test/accuracy", 0.8, 1),
    "lightning": (3, "test/accuracy", 0.8, 1),
    "nvflare": (5, "test/accuracy", 0.6, 1),
    "spark": (4, "test/accuracy", 0.8, 1),
    "torchtitan": (2, "test/perplexity", 1, 100),
}


def test_every_page_has_a_result() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == RESULTS.keys()


@pytest.mark.parametrize("page", RESULTS)
def test_the_example_trains(page: str, ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(PAGES / f"{page}.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in example.files:
        if name.startswith("make_"):
            runpy.run_path(name)
    (command,) = example.commands
    assert command[:3] == ["python", "-m", "trainer"]
    ranks(2).run(work, command[3:], str(tmp_path))
    rounds, metric, least, most = RESULTS[page]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["round"] == rounds and least < result[metric] <= most, result
    if page == "flower":
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["clients/trained"] for line in lines] == [5] * 10
