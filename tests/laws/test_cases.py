"""Every algorithm of conf/algorithm/ is held to the laws, and documented."""

from __future__ import annotations

import re

from tests.cli.command import ROOT, named_choices
from tests.laws.cases import CASES

# Algorithms whose options other rows have, so that another row would run the same code.
ROWS = {
    "fedavgm": "fedavg_momentum",
    "fedbn": "local",  # has personal names; test_batch_statistics.py has laws of its statistics
    "post_local": "diloco",  # equal weights, kept state; test_heterogeneity.py has a law of its short rounds
}
CHOICES = named_choices("algorithm")


def documented() -> set[str]:
    """Return the names in the first column of the table of algorithms in docs/algorithms.md."""
    section = (ROOT / "docs/algorithms.md").read_text().split("## Formulas")[1].split("\n## ")[0]
    cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_algorithm_has_a_row_in_the_laws():
    missing = [name for name in CHOICES if ROWS.get(name, name) not in CASES]
    assert not missing, "add a row to CASES in tests/laws/cases.py, or name the row in ROWS"
    assert set(ROWS) <= set(CHOICES)


def test_every_algorithm_has_a_row_in_the_docs():
    """Every row is of an existing algorithm, too."""
    assert documented() == set(CHOICES), "see Formulas in docs/algorithms.md"
