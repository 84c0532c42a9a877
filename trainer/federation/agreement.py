"""How the members of a federation agree on what is measured of all examples: their sums meet at the coordinator."""

from __future__ import annotations

import json

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from trainer.federation.exchange import Gatherings, Meetings
from trainer.federation.link import LinkLostError
from trainer.federation.messages import Limit, Message
from trainer.federation.spool import OF_ALL
from trainer.loop.stopping import Preempted
from trainer.utils.errors import InputError

SETS, SUMS = "sets", "sums"  # tensors in the messages
MAX_SETS_BYTES = 1 << 26  # of the texts of one member


class SiteAgreement:
    """A site brings what it has measured of its own examples, and gets what the coordinator has made of all.

    Args:
        meetings: with the other members, at the coordinator.
    """

    def __init__(self, meetings: Meetings):
        self.meetings = meetings

    def union(self, name: str, sets: list[list[str]]) -> list[list[str]]:
        result = self._meet(name, SETS, _as_bytes(sets), Limit(MAX_SETS_BYTES))
        return _sets_of(result, len(sets))

    def total(self, name: str, sums: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(sums)
        return self._meet(name, SUMS, own, Limit.like((), {SUMS: own})).numpy()

    def _meet(self, name: str, kind: str, own: Tensor, limit: Limit) -> Tensor:
        try:
            return self.meetings.meet(Message({"key": f"{OF_ALL}{name}"}, {kind: own}), limit).tensors[kind]
        except LinkLostError as error:
            raise Preempted from error


class CoordinatorAgreement:
    """The coordinator puts together what the sites bring, in the order of the members. It waits for all of them.

    Args:
        gatherings: the members.
    """

    def __init__(self, gatherings: Gatherings):
        self.gatherings = gatherings

    def union(self, name: str, sets: list[list[str]]) -> list[list[str]]:
        brought = [_sets_of(each, len(sets)) for each in self._gather(name, SETS, Limit(MAX_SETS_BYTES))]
        found = [sorted(set().union(*column)) for column in zip(sets, *brought, strict=True)]
        self._publish(name, SETS, _as_bytes(found))
        return found

    def total(self, name: str, sums: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(sums)
        for brought in self._gather(name, SUMS, Limit.like((), {SUMS: total})):
            total = total + brought
        self._publish(name, SUMS, total)
        return total.numpy()

    def _gather(self, name: str, kind: str, limit: Limit) -> list[Tensor]:
        brought = self.gatherings.gather(f"{OF_ALL}{name}", limit, None)
        if brought is None:
            raise Preempted
        return [message.tensors[kind] for message in brought.values()]

    def _publish(self, name: str, kind: str, result: Tensor) -> None:
        self.gatherings.publish(f"{OF_ALL}{name}", Message({}, {kind: result}))


def _as_bytes(sets: list[list[str]]) -> Tensor:
    """Return sets of texts as a tensor: the categories of tables may be more than a header holds."""
    return torch.frombuffer(bytearray(json.dumps(sets).encode()), dtype=torch.uint8)


def _sets_of(content: Tensor, count: int) -> list[list[str]]:
    try:
        sets = TypeAdapter(list[list[str]]).validate_json(content.numpy().tobytes())
    except ValidationError as error:
        raise InputError("a member has sent categories that are no texts") from error
    if len(sets) != count:
        raise InputError(f"a member has sent the categories of {len(sets)} columns, and there are {count}")
    return sets
