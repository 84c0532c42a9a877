"""Why examples cannot be dealt so: messages that name the keys."""

from __future__ import annotations

from trainer.data.partition.clients import Clients
from trainer.data.sources.base import Source


def raise_errors(errors: list[str]) -> None:
    """Raises ValueError with all of them, if there are any."""
    if errors:
        raise ValueError("\n".join(errors))


def size_errors(partition: str, train: Source, clients: int, min_examples: int) -> list[str]:
    """What is wrong with these numbers of clients and examples."""
    errors = []
    if clients < 1:
        errors.append(f"clients={clients}: there is at least 1 client")
    if min_examples < 1:
        errors.append(f"partition.min_examples={min_examples}: a client has at least 1 example to train on")
    if not errors and clients * min_examples > len(train):
        fewer = f"  set clients={len(train) // min_examples} or fewer"
        less = f", or partition.min_examples={len(train) // clients} or less" if clients <= len(train) else ""
        errors.append(
            f"partition={partition}: clients={clients} with partition.min_examples={min_examples} need "
            f"{clients * min_examples} training examples, and there are {len(train)}.\n{fewer}{less}"
        )
    return errors


def column_errors(partition: str, column: str, *sources: Source) -> list[str]:
    """What is wrong with sources of which one lacks the column that examples are dealt by."""
    if all(getattr(source, column) is not None for source in sources):
        return []
    return [
        f"partition={partition} deals examples by their {column}, and this data has no {column}.\n"
        f"  set partition=iid, or give the train and the test source {column}: one integer an example"
    ]


def smallest_errors(partition: str, clients: Clients, min_examples: int, way_out: str) -> list[str]:
    """What is wrong with the smallest of these clients."""
    smallest = int(clients.sizes.min())
    if smallest >= min_examples:
        return []
    return [
        f"partition={partition}: the smallest of clients={len(clients)} has {smallest} training examples, fewer than "
        f"partition.min_examples={min_examples}.\n  {way_out}, or set a smaller partition.min_examples="
    ]
