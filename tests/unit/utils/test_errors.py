"""Errors of several ranks, of which some have found more."""

from __future__ import annotations

from trainer.utils.errors import distinct_errors


def test_an_error_of_several_ranks_is_shown_once():
    one, other = "rate=0\n  valid: above 0", "size=a\n  valid: a number\n  or auto"
    assert distinct_errors([f"{one}\n{other}", one, f"{other}\n{one}"]) == [one, other]
