"""What the coordinator knows of the members: who is there, what each has brought, and what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from trainer.federation.messages import Message

POLL_SECONDS = 0.1  # of a wait that something else may end


class RefusedError(Exception):
    """A request of a member that is refused: the sentence says why."""


@dataclass
class Member:
    """A member as the coordinator sees it.

    Attributes:
        session: of its launch that is present; empty if it is absent.
        since: the reading of the monotonic clock when it came or went.
    """

    session: str = ""
    since: float = field(default_factory=monotonic)


@dataclass
class Meeting:
    """What the members bring under one key, and the result."""

    brought: dict[str, Message] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    result: Message | None = None


class Registry:
    """The members and their meetings. Every method may be called by any thread.

    A meeting has a key, under which each member brings one message, however often it sends it. The newest meetings are
    kept, so that a member that missed a result may ask again.

    Args:
        members: their names, in the order in which sums are made.
        grace_seconds: how long a meeting waits for a member that has vanished; None: for ever.
        min_members: without which no meeting ends.
    """

    KEPT = 4

    def __init__(self, members: Sequence[str], grace_seconds: float | None = None, min_members: int | None = None):
        self.members = {name: Member() for name in members}
        self.grace_seconds = grace_seconds
        self.min_members = len(members) if min_members is None else min_members
        self.meetings: dict[str, Meeting] = {}
        self.changed = threading.Condition()

    def enter(self, name: str, session: str) -> None:
        """Count a member as present.

        Raises:
            RefusedError: it is no member, or another launch of it is present.
        """
        with self.changed:
            member = self._member(name)
            if member.session not in ("", session):
                raise RefusedError(
                    f"{name} is here already, by another launch\n  end that one, or give this one a name of its own"
                )
            if not member.session:
                member.session, member.since = session, monotonic()
            self.changed.notify_all()

    def leave(self, name: str, session: str) -> None:
        """Count a member as absent, if its present launch is this one."""
        with self.changed:
            member = self._member(name)
            if member.session == session:
                member.session, member.since = "", monotonic()
            self.changed.notify_all()

    def present(self) -> list[str]:
        """Return the names of the members that are present."""
        with self.changed:
            return [name for name, member in self.members.items() if member.session]

    def bring(self, name: str, key: str, message: Message) -> None:
        """Take what a member brings; a second time, or after the result, it changes nothing."""
        with self.changed:
            self._member(name)
            meeting = self._meeting(key)
            if meeting.result is None:
                meeting.brought.setdefault(name, message)
            self.changed.notify_all()

    def gather(self, key: str, is_stopping: Callable[[], bool] = lambda: False) -> dict[str, Message] | None:
        """Wait until all have come, or those who have not have been away for the grace; return what was brought.

        Args:
            key: of the meeting.
            is_stopping: ends the wait.

        Returns:
            The messages by member, in the order of the members; None if the wait was ended.
        """
        with self.changed:
            meeting = self._meeting(key)
            while not self._is_complete(meeting):
                if is_stopping():
                    return None
                self.changed.wait(POLL_SECONDS)
            meeting.counted = tuple(name for name in self.members if name in meeting.brought)
            return {name: meeting.brought[name] for name in meeting.counted}

    def publish(self, key: str, result: Message) -> None:
        """Give all who wait the result of a meeting, whose messages are dropped. Its tensors must not change."""
        with self.changed:
            meeting = self._meeting(key)
            meeting.result, meeting.brought = result, {}
            meeting.counted = meeting.counted or tuple(self.members)
            for old in list(self.meetings)[: -self.KEPT]:
                del self.meetings[old]
            self.changed.notify_all()

    def result(self, name: str, key: str, is_waiting: Callable[[], bool]) -> Message | None:
        """Wait for the result of a meeting; None if the member was not counted, or waits no more."""
        with self.changed:
            while (meeting := self._meeting(key)).result is None:
                if not is_waiting():
                    return None
                self.changed.wait(POLL_SECONDS)
            return meeting.result if name in meeting.counted else None

    def _is_complete(self, meeting: Meeting) -> bool:
        missing = [member for name, member in self.members.items() if name not in meeting.brought]
        if not missing:
            return True
        if self.grace_seconds is None or len(meeting.brought) < self.min_members:
            return False
        return all(map(self._is_lost, missing))

    def _is_lost(self, member: Member) -> bool:
        assert self.grace_seconds is not None
        return not member.session and monotonic() - member.since >= self.grace_seconds

    def _meeting(self, key: str) -> Meeting:
        return self.meetings.setdefault(key, Meeting())

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise RefusedError(f"{name} is no member\n  valid: {', '.join(self.members)}")
        return self.members[name]
