"""Every algorithm of conf/algorithm/ is held to the laws, and documented."""

from __future__ import annotations

import re

from tests.cli.command import ROOT, named_choices
from tests.laws.cases import CASES

# Choices of options that another row has already, so that a row of their own would run the same code.
ROWS = {
    "fedavgm": "fedavg_momentum",
    "fedbn": "local",  # some names are personal; its statistics have laws in test_batch_statistics.py
    "post_local": "diloco",  # equal weights, state kept; its short rounds have laws in test_heterogeneity.py
}
CHOICES = named_choices("algorithm")


def documented() -> set[str]:
    """The names in the first cells of the table of docs/algorithms.md that says what algorithms compute."""
    section = (ROOT / "docs/algorithms.md").read_text().split("## What they compute")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_algorithm_has_a_row_in_the_laws():
    missing = [name for name in CHOICES if ROWS.get(name, name) not in CASES]
    assert not missing, "add a row to CASES in tests/laws/cases.py, or name the row in ROWS"
    assert set(ROWS) <= set(CHOICES)


def test_every_algorithm_has_a_row_in_the_docs():
    """And no row is of an algorithm that does not exist."""
    assert documented() == set(CHOICES), "see What they compute in docs/algorithms.md"
