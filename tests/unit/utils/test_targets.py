"""Classes state facts about themselves, which their names do not."""

from __future__ import annotations

import pytest

from trainer.utils.targets import declares


@pytest.mark.parametrize(
    ("target", "attribute", "expected"),
    [
        ("trainer.optim.Constant", "is_constant", True),
        ("trainer.optim.schedules.Cosine", "is_constant", False),
        ("trainer.data.Natural", "is_natural", True),
        ("trainer.data.Iid", "is_natural", False),
        ("trainer.algorithms.Sync", "moves_global_model", True),
        ("trainer.algorithms.FedAvg", "moves_global_model", False),  # a property, of which the class knows no value
        ("trainer.optim.Muon", "needs_matrices", True),
        ("torch.optim.Adam", "needs_matrices", False),
        ("no_such_module.Constant", "is_constant", False),
        ("not a name", "is_constant", False),
    ],
)
def test_a_class_declares_what_it_has(target: str, attribute: str, expected: bool) -> None:
    assert declares(target, attribute) is expected
