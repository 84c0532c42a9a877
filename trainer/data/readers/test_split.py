"""Find the test and the validation set among the parts of a file, or draw a test set if it brings none."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from trainer.utils.seeding import numpy_generator

HELD_OUT_NAMES = ("test", "validation", "valid", "val")


def held_out_names(names: Collection[str]) -> tuple[str | None, str | None]:
    """Return the names of the test and of the validation part; without a test part, validation takes its place."""
    test, validation, *_ = [*(name for name in HELD_OUT_NAMES if name in names), None, None]
    return test, validation


def test_fraction_errors(test: float) -> list[str]:
    """Return an error unless `data.test`, the fraction of the test set, is between 0 and 1."""
    if 0 < test < 1:
        return []
    return [f"data.test={test}: the fraction of the test set, between 0 and 1, such as 0.1"]


def draw_test_mask(examples: int, test: float, groups: np.ndarray | None = None) -> np.ndarray:
    """Draw which examples form the test set, the same ones at every call.

    Args:
        examples: N, the number of examples.
        test: fraction of the test set.
        groups: client id or label of each example, int64 [N]. The fraction (rounded) is drawn from each group, and at
            least one example of a group remains for training.

    Returns:
        bool [N]. Without groups, both sides get at least one of two or more examples.
    """
    order = numpy_generator("test set").permutation(examples)
    if groups is None:
        group_of, sizes = np.zeros(examples, np.int64), np.array([examples])
    else:
        _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    least = 1 if groups is None else 0
    quota = np.clip(np.rint(test * sizes).astype(np.int64), least, np.maximum(sizes - 1, 0))
    by_group = order[np.argsort(group_of[order], kind="stable")]
    rank_in_group = np.arange(examples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_test = np.zeros(examples, bool)
    is_test[by_group] = rank_in_group < np.repeat(quota, sizes)
    return is_test
