"""Which examples are the test set, where a file does not say so itself."""

from __future__ import annotations

import numpy as np

from trainer.utils.seeding import numpy_generator


def test_fraction_errors(test: float) -> list[str]:
    """What is wrong with `data.test`, the part that is the test set."""
    if 0 < test < 1:
        return []
    return [f"data.test={test}: the test set is a fraction between 0 and 1, such as 0.1"]


def test_mask(examples: int, test: float, client_ids: np.ndarray | None = None) -> np.ndarray:
    """Whether each example belongs to the test set: bool [examples], drawn, always the same.

    That is `test` of every owner's examples (rounded), and an owner keeps at least one to train on. Where nobody owns
    them, both sides get at least one of two or more.
    """
    order = numpy_generator("test set").permutation(examples)
    if client_ids is None:
        owner_of, sizes = np.zeros(examples, np.int64), np.array([examples])
    else:
        _, owner_of, sizes = np.unique(client_ids, return_inverse=True, return_counts=True)
    least = 1 if client_ids is None else 0
    quota = np.clip(np.rint(test * sizes).astype(np.int64), least, np.maximum(sizes - 1, 0))
    by_owner = order[np.argsort(owner_of[order], kind="stable")]
    place = np.arange(examples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.zeros(examples, bool)
    held[by_owner] = place < np.repeat(quota, sizes)
    return held
