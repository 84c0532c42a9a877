"""Which way is better, by the name of a figure."""

from __future__ import annotations

HIGHER_IS_BETTER = ("accuracy", "top5", "f1", "auc", "r2", "jain", "cosine", "per_second", "mfu")

HEADLINES = ("accuracy", "micro_f1", "perplexity", "mae", "loss")  # the first that there is tells most


def higher_is_better(name: str) -> bool:
    """Whether a higher value of the figure is the better one, as of `test/accuracy`; of losses and seconds it is not.

    A score of one's own task is taken for an error, unless its name ends with one of `HIGHER_IS_BETTER`.
    """
    return name.endswith(HIGHER_IS_BETTER)
