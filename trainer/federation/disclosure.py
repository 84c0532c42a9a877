"""The list of what leaves a site, by which each message is reduced, and which the site prints when it joins.

A table or vector that the list does not name leaves no site.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.federation.messages import TABLE, Message
from trainer.federation.options import FIGURES, Figure
from trainer.utils.errors import InputError

BY_CLIENT = re.compile(f"{TABLE}.+/clients")  # the tables of an evaluation that have a row for each client
BY_SILO = f"{TABLE}silos"  # seconds, of which only the slowest silo's are reported


@dataclass(frozen=True)
class Item:
    """An item of the list.

    Attributes:
        text: describes it.
        key: regular expression of the meetings to which it is brought.
        names: those of its scalars, tables and vectors.
        needs: the figures that a site must allow; without them zeros leave in its place.
        remedy: of a run that cannot do without; empty if zeros may leave in its place.
    """

    text: str
    key: str
    names: tuple[str, ...]
    needs: frozenset[Figure] = frozenset()
    remedy: str = ""

    def has(self, key: str, name: str) -> bool:
        """Return whether this is about a scalar, table or vector that is brought to a meeting."""
        return bool(re.fullmatch(self.key, key)) and any(re.fullmatch(each, name) for each in self.names)


# Of the join, and of all that is asked at the coordinator.
ALWAYS = (
    "its name, the number of its launch, the choices that all members must make alike",
    "the numbers of its examples, their types and shapes, the names of their classes and columns",
    "how many rounds it has saved, whether it is asked to stop",
)
TRAINING, EVALUATION = r"rounds/\d+/training", r"rounds/\d+/evaluation"
# Of the messages that it brings to meetings. The first that has a name is about it.
ITEMS = (
    Item(
        "each round: loss, gradient norm, update norm and seconds of its training",
        TRAINING,
        ("loss_sum", "units", "gradient_norms", "on_time", "table/cohort", "table/silos"),
        frozenset({"training"}),
    ),
    Item(
        "each round: the update of its model, with its weight, norm, steps, examples and learning rate",
        TRAINING,
        ("vector/.+", r"\w+"),
    ),
    Item("each round: the statistics of BatchNorm", TRAINING, ("table/statistics", "table/counts")),
    Item(
        "each evaluation: sums of scores over its test and validation examples, and their number",
        EVALUATION,
        (r"table/\w+/clients", r"table/\w+/by_client"),
        frozenset({"evaluation"}),
    ),
    Item(
        "each evaluation: counts by label, scores with labels (F1, AUC); at the end the confusion matrix",
        f"{EVALUATION}|end/artifacts",
        (r"table/\w+/.+", "table/confusion"),
        frozenset({"evaluation", "labels"}),
    ),
    Item(
        "at the start, if they are measured: sums over its training examples, categories of columns",
        r"start/(transforms|columns)-\w+",
        ("table/total", "sums", "sets"),
        frozenset({"statistics"}),
        "give the numbers, as transforms=[normalise] does",
    ),
    Item(
        "at the start, with task.class_weights: the number of its training examples by class",
        "start/weights-classes",  # the sum of given weights tells it, too
        ("sums",),
        frozenset({"labels"}),
        "train without task.class_weights",
    ),
    Item(
        "at the start, if its examples have weights: their sum",
        "start/weights-clients",
        ("sums",),
    ),
)


class Disclosure:
    """The part of its messages that a site discloses.

    Args:
        allowed: the figures that it allows.
        names_clients: whether the others get the scores of single clients, and not only their sum.
    """

    def __init__(self, allowed: Collection[Figure] = FIGURES, names_clients: bool = True):
        self.allowed, self.names_clients = frozenset(allowed), names_clients

    @property
    def withheld(self) -> list[Figure]:
        """The figures that it does not allow."""
        return [figure for figure in FIGURES if figure not in self.allowed]

    def reduce(self, message: Message) -> Message:
        """Return the part of a message that may be brought to its meeting, with zeros for what is not allowed.

        Raises:
            InputError: the run cannot do without a number that is not allowed, or the list does not name one.
        """
        key: str = message.header["key"]
        header = dict(message.header)
        if "sums" in header:
            sums = header["sums"].items()
            header["sums"] = {name: value if self._allows(key, name) else 0.0 for name, value in sums}
        tensors = {
            name: self._anonymous(name, tensor) if self._allows(key, name) else torch.zeros_like(tensor)
            for name, tensor in message.tensors.items()
        }
        return Message(header, tensors)

    def lines(self) -> list[str]:
        """Return the list, a line for each item: always, by which figures it is allowed, or that it stays."""
        states = [("always", text) for text in ALWAYS] + [(self._state(item), item.text) for item in ITEMS]
        return [f"  {state:<18} {text}" for state, text in sorted(states, key=lambda each: each[0] == "stays")]

    def _allows(self, key: str, name: str) -> bool:
        item = next((item for item in ITEMS if item.has(key, name)), None)
        if item is None and name != "stopping":
            raise InputError(f"{name} of {key} is not in the list of what may leave a site: nothing of it has left")
        if item is None or item.needs <= self.allowed:
            return True
        if item.remedy:
            raise InputError(
                f"site.allow={format_figures(self.allowed)}, and this run needs of every site "
                f"{item.text.rpartition(': ')[2]}\n"
                f"  add {', '.join(item.needs)} to site.allow, or {item.remedy}"
            )
        return False

    def _anonymous(self, name: str, tensor: Tensor) -> Tensor:
        """Return a table that says of no single client what it adds, if they are not to be named."""
        if self.names_clients or not (name == BY_SILO or BY_CLIENT.fullmatch(name)):
            return tensor
        pooled = torch.zeros_like(tensor)
        if name != BY_SILO:
            pooled[:1] = tensor.sum(0)  # others add theirs to the same row
        return pooled

    def _state(self, item: Item) -> str:
        return format_figures(item.needs)[1:-1] or "always" if item.needs <= self.allowed else "stays"


def format_figures(figures: Collection[Figure]) -> str:
    """Format figures as the configuration has them."""
    return f"[{','.join(figure for figure in FIGURES if figure in figures)}]"
