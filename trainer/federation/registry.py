"""The members, as the coordinator knows them: who is there, what each has brought, and the results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from trainer.checkpoint.files import sync
from trainer.federation.messages import Limit, Message
from trainer.federation.spool import OF_ALL, OF_END, Spool, round_of

POLL_SECONDS = 0.1  # of a wait that something else may end
WAIT_SECONDS = 1.0  # of a wait that is woken up when it ends
SILENCE_SECONDS = 5.0  # after which the link of a launch that has vanished is known to be dead


class RefusedError(Exception):
    """A request of a member that is refused: the sentence says why."""


class NotJoinedError(Exception):
    """A member sends something before it has joined, or after its stream has ended: it joins again."""


class BusyError(Exception):
    """A member has more streams than it needs. Those of a link that broke end within seconds: it tries again."""


class OverError(Exception):
    """A meeting is over, and its result is kept no more: the member is behind."""


@dataclass
class Member:
    """A member as the coordinator sees it.

    Attributes:
        session: of its launch that is present; empty if it is absent.
        streams: by which this launch is present: of a broken one and its successor, the end of the former may be
            noticed last.
        since: the reading of the monotonic clock when it came or went.
        saved: the number of rounds of the checkpoint from which it would resume.
    """

    session: str = ""
    streams: int = 0
    since: float = field(default_factory=monotonic)
    saved: int = 0


@dataclass
class Meeting:
    """The messages that the members bring under one key, and the result.

    Attributes:
        limit: of what a member may bring; None until the coordinator waits for it.
        brought: the names of those whose messages are there.
        counted: the names of those whose messages are in the result; None until that is decided.
        has_result: whether there is a result.
    """

    limit: Limit | None = None
    brought: set[str] = field(default_factory=set)
    counted: tuple[str, ...] | None = None
    has_result: bool = False


class Registry:
    """The members and their meetings. Every method may be called by any thread.

    A meeting has a key, under which each member brings one message, however often it sends it. Messages and results are
    files: a coordinator that is started again finds them, makes the same results of the same messages, and gives a
    member that is started again the results it asks for. What no one may need any more is removed.

    Args:
        spool: the files.
        members: their names, in the order in which sums are made.
        grace_seconds: how long a meeting waits for a member that has vanished; None: for ever.
        min_members: how many a meeting needs; None: all.
        saved: returns the number of rounds of the checkpoint from which the coordinator would resume.
    """

    def __init__(
        self,
        spool: Spool,
        members: Sequence[str],
        grace_seconds: float | None = None,
        min_members: int | None = None,
        saved: Callable[[], int] = lambda: 0,
    ):
        self.spool, self.grace_seconds, self._saved = spool, grace_seconds, saved
        self.members = {name: Member() for name in members}
        self.min_members = len(members) if min_members is None else min_members
        self.meetings: dict[str, Meeting] = {}
        for key in spool.meetings():
            header = spool.result_header(key)
            counted = tuple(header["counted"]) if header else None  # pyright: ignore[reportArgumentType]
            self.meetings[key] = Meeting(None, spool.members(key), counted, header is not None)
        self.oldest = min((index for key in self.meetings if (index := round_of(key)) is not None), default=0)
        lock = threading.RLock()
        self.changed = threading.Condition(lock)  # notified for `gather`: members came, went, or brought something
        # Each member waits at a condition of its own, or each message would wake up the threads of all members.
        self._waiting = {name: threading.Condition(lock) for name in members}
        self._state: Path | None = None  # for those who are late; None: it would be of an earlier meeting
        self._wants_state = False

    def enter(self, name: str, session: str, is_waiting: Callable[[], bool] = lambda: True) -> None:
        """Count a member as present. Wait a moment for the end of a launch before it, which may have vanished.

        Args:
            name: of the member.
            session: of its launch.
            is_waiting: whether the member still waits.

        Raises:
            RefusedError: it is no member, or another launch of it is present.
        """
        with self.changed:
            member, deadline = self._member(name), monotonic() + SILENCE_SECONDS
            while member.session not in ("", session):
                if not is_waiting() or monotonic() >= deadline:
                    raise RefusedError(
                        f"{name} is here already, by another launch\n  end that one, or give this one a name of its own"
                    )
                self.changed.wait(POLL_SECONDS)
            member.session, member.streams, member.since = session, member.streams + 1, monotonic()
            self.changed.notify_all()

    def leave(self, name: str, session: str) -> None:
        """Take a stream of a member as ended; without another one the member is absent."""
        with self.changed:
            member = self._member(name)
            assert member.session == session, (member, session)
            member.streams -= 1
            if not member.streams:
                member.session, member.since = "", monotonic()
            self.changed.notify_all()

    def wake(self, name: str) -> None:
        """Let the requests of a member look again whether they still wait."""
        with self.changed:
            if name in self._waiting:
                self._waiting[name].notify_all()

    def check_member(self, name: str) -> None:
        """Raise RefusedError if this is no member."""
        self._member(name)

    def check(self, name: str, session: str) -> None:
        """Raise NotJoinedError if this launch is not the one that is present."""
        with self.changed:
            if not session or self._member(name).session != session:
                raise NotJoinedError(f"{name} has not joined")

    def present(self) -> list[str]:
        """Return the names of the members that are present."""
        with self.changed:
            return [name for name, member in self.members.items() if member.session]

    def count_open(self) -> int:
        """Return the number of meetings that wait for members."""
        with self.changed:
            return sum(meeting.limit is not None and not meeting.has_result for meeting in self.meetings.values())

    def wait_open(self, name: str, key: str, saved: int, is_waiting: Callable[[], bool]) -> Limit | None:
        """Wait until a member may bring a message to a meeting.

        Args:
            name: of the member.
            key: of the meeting.
            saved: the number of rounds of the checkpoint from which the member would resume.
            is_waiting: whether the member still waits.

        Returns:
            The limit of what it may bring; None if it need not: it has brought it, or there is a result.

        Raises:
            OverError: the meeting is over, and its result is kept no more.
        """
        with self.changed:
            self._member(name).saved = saved
            index = round_of(key)
            while is_waiting():
                if index is not None and index < self.oldest:
                    raise OverError(f"{key} is over")
                meeting = self.meetings.get(key)
                if meeting and (meeting.has_result or name in meeting.brought):
                    return None
                if meeting and meeting.limit is not None:
                    return meeting.limit
                self._waiting[name].wait(WAIT_SECONDS)
            return None

    def bring(self, name: str, key: str) -> None:
        """Count what a member has brought, which the spool holds; after the meeting was decided it changes nothing."""
        with self.changed:
            self.meetings[key].brought.add(name)
            self.changed.notify_all()

    def gather(
        self,
        key: str,
        limit: Limit,
        make_state: Callable[[], Message] | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
        farewell_seconds: float | None = None,
    ) -> dict[str, Message] | None:
        """Wait until all have come, or those who have not have been away for the grace; return what was brought.

        Args:
            key: of the meeting.
            limit: of what a member may bring.
            make_state: returns the state of the run, for members that are late; None: no one can be late yet.
            is_stopping: ends the wait.
            farewell_seconds: how long it waits, whatever the grace, for a member that is away and has come to another
                meeting of the end: it has its result. None: as for any other.

        Returns:
            The messages by member, in the order of the members; None if the wait was ended.
        """
        with self.changed:
            meeting = self.meetings.setdefault(key, Meeting())
            meeting.limit, self._state = limit, None
            self._wake_all()
            while meeting.counted is None and not self._is_complete(key, meeting, farewell_seconds):
                if is_stopping():
                    return None
                if self._wants_state and make_state:
                    self._state, self._wants_state = self.spool.put_state(make_state()), False
                    self._wake_all()
                self.changed.wait(POLL_SECONDS)
            if meeting.counted is None:
                meeting.counted = tuple(name for name in self.members if name in meeting.brought)
            self._state = None
            return {name: self.spool.message(key, name) for name in meeting.counted}

    def publish(self, key: str, result: Message) -> None:
        """Give all who wait the result of a meeting."""
        with self.changed:
            meeting = self.meetings.setdefault(key, Meeting())
            meeting.counted = tuple(self.members) if meeting.counted is None else meeting.counted
            counted = meeting.counted
        path = self.spool.put_result(key, Message({**result.header, "counted": list(counted)}, result.tensors))
        with self.changed:
            meeting.has_result = True
            self._wake_all()
        sync(path)
        sync(path.parent)
        self._forget()

    def result(self, name: str, key: str, is_waiting: Callable[[], bool]) -> Path | None:
        """Wait for the result of a meeting; return its file, None if the member waits no more."""
        with self.changed:
            while is_waiting() and key in self.meetings:
                if self.meetings[key].has_result:
                    return self.spool.result(key)
                self._waiting[name].wait(WAIT_SECONDS)
            return None

    def newest(self, name: str, rounds: int, is_waiting: Callable[[], bool]) -> Path | None:
        """Return the file of the state of the run, if a member has missed a round; None if it has missed none.

        Args:
            name: of the member.
            rounds: the number of rounds that it has done.
            is_waiting: whether the member still waits.
        """
        with self.changed:
            if not self._is_behind(name, rounds):
                return None
            while is_waiting():
                if self._state:
                    return self._state
                self._wants_state = True
                self.changed.notify_all()
                self._waiting[name].wait(WAIT_SECONDS)
            return None

    def _wake_all(self) -> None:
        for condition in self._waiting.values():
            condition.notify_all()

    def _is_behind(self, name: str, rounds: int) -> bool:
        if rounds < self.oldest:
            return True
        missed = [
            index
            for key, meeting in self.meetings.items()
            if meeting.has_result and name not in (meeting.counted or ()) and (index := round_of(key)) is not None
        ]
        return any(index >= rounds for index in missed)

    def _is_complete(self, key: str, meeting: Meeting, farewell_seconds: float | None) -> bool:
        missing = [name for name in self.members if name not in meeting.brought]
        if farewell_seconds is not None:
            missing = [name for name in missing if not self._has_left(name, farewell_seconds)]
        if not missing:
            return True
        if key.startswith(OF_ALL) or self.grace_seconds is None or len(meeting.brought) < self.min_members:
            return False
        return all(self._is_lost(self.members[name]) for name in missing)

    def _has_left(self, name: str, farewell_seconds: float) -> bool:
        """Return whether a member is away that has come to a meeting of the end: it has its result."""
        has_result = any(name in each.brought for key, each in self.meetings.items() if key.startswith(OF_END))
        return has_result and self._is_away(self.members[name], farewell_seconds)

    def _is_lost(self, member: Member) -> bool:
        return self.grace_seconds is not None and self._is_away(member, self.grace_seconds)

    @staticmethod
    def _is_away(member: Member, seconds: float) -> bool:
        return not member.session and monotonic() - member.since >= seconds

    def _forget(self) -> None:
        """Remove what no one that is started again would ask for."""
        with self.changed:
            own = self._saved()
            kept = min([own, *(member.saved for member in self.members.values() if not self._is_lost(member))])
            for key in list(self.meetings):
                index = round_of(key)
                if index is not None and index < kept:
                    del self.meetings[key]
                    self.spool.forget(key)
                elif index is not None and index < own:
                    self.spool.forget_brought(key)
            self.oldest = max(self.oldest, kept)

    def _member(self, name: str) -> Member:
        if name not in self.members:
            raise RefusedError(f"{name} is no member\n  valid: {', '.join(self.members)}")
        return self.members[name]
