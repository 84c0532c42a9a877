"""LoopControl: replicas take the same action on the same step, and signals and time limits are obeyed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from unittest.mock import patch

import pytest

from trainer.algorithms.client_result import ClientResult
from trainer.distributed.topology import distributed
from trainer.loop import control
from trainer.loop.control import CONSENSUS_INTERVAL_SECONDS, Action, ActionConsensus, LoopControl


class Clock:
    """A clock that a test advances."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@contextmanager
def clock_by_hand() -> Iterator[Clock]:
    clock = Clock()
    with patch.object(control, "perf_counter", clock):
        yield clock


@pytest.fixture
def clock() -> Iterator[Clock]:
    with clock_by_hand() as clock:
        yield clock


def test_who_is_told_nothing_goes_on(clock: Clock):
    mine = LoopControl()
    clock.seconds = 1e9
    assert mine.requested_action() is Action.CONTINUE


def test_it_is_time_to_save(clock: Clock):
    """A number of seconds after the start, and after every save."""
    mine = LoopControl(checkpoint_seconds=10)
    for began in (0, 11, 30):
        clock.seconds = began
        mine.restart_checkpoint_timer()
        clock.seconds = began + 10
        assert mine.requested_action() is Action.CONTINUE
        clock.seconds = began + 10.1
        assert mine.requested_action() is Action.CHECKPOINT


def test_it_is_time_to_leave(clock: Clock):
    """A number of seconds after the start, whatever was saved; stopping has priority over saving."""
    clock.seconds = 5
    mine = LoopControl(checkpoint_seconds=1, max_seconds=10)
    clock.seconds = 14.9
    assert mine.requested_action() is Action.CHECKPOINT
    mine.restart_checkpoint_timer()
    assert mine.requested_action() is Action.CONTINUE
    clock.seconds = 15.1
    assert mine.requested_action() is Action.STOP


def test_told_to_leave_by_a_thread(clock: Clock):
    """One request is enough, and is not forgotten."""
    mine = LoopControl()
    thread = Thread(target=mine.request_stop)
    thread.start()
    thread.join()
    mine.restart_checkpoint_timer()
    assert [mine.requested_action(), mine.requested_action()] == [Action.STOP] * 2


def test_what_is_done_is_said():
    """The description has the phase, and during training the client and its current step."""
    mine, work = LoopControl(), ClientResult(client=3, weight=10, steps=17)
    assert mine.activity() == "starting"
    mine.set_activity("round 2: training", work)
    work.steps += 1
    assert mine.activity() == "round 2: training client 3, step 18"
    mine.set_activity("round 2: evaluating")
    assert mine.activity() == "round 2: evaluating"


def test_a_single_replica_hears_at_once(clock: Clock):
    """It acts on every step, without a vote; a save is counted."""
    with distributed() as topology:
        mine = LoopControl(checkpoint_seconds=10)
        vote = ActionConsensus(topology, mine)
        assert vote.poll() is Action.CONTINUE
        clock.seconds = 11
        assert vote.poll() is Action.CHECKPOINT
        assert vote.poll() is Action.CONTINUE
        mine.request_stop()
        assert vote.poll() is Action.STOP
        vote.flush()


STEPS = 60

Told = dict[int, dict[int, str]]  # by replica and step: "save" or "leave"


def votes(reported: Told, milliseconds: list[float]) -> tuple[list[Action], list[int], float]:
    """Return the action of this replica after each step, the vote period after each, and the time of the last save.

    Its steps take as many milliseconds as its entry says, by its own clock.
    """
    with distributed() as topology, clock_by_hand() as clock:
        mine = LoopControl(checkpoint_seconds=1e6)
        vote, wishes, periods = ActionConsensus(topology, mine), [], []
        for step in range(STEPS):
            clock.seconds += milliseconds[topology.replica] / 1000
            order = reported.get(topology.replica, {}).get(step)
            if order == "save":
                mine.checkpointed_at = -1e9
            if order == "leave":
                mine.request_stop()
            wishes.append(vote.poll())
            periods.append(vote.period)
        vote.flush()
        assert vote.pending is None
        return wishes, periods, mine.checkpointed_at


def agreed(pool, reported: Told, milliseconds: list[float]) -> list[Action]:
    """Return the actions after each step, after checking that all replicas take the same ones."""
    (wishes, periods, _), *others = pool.run(votes, reported, milliseconds)
    assert all(other[:2] == (wishes, periods) for other in others)
    return wishes


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("reported", [{0: {20: "leave"}}, {1: {20: "leave"}}, {0: {20: "leave"}, 1: {40: "leave"}}])
def test_all_leave_on_the_same_step(ranks, replicas: int, reported: Told):
    """Any replica may be preempted; all stop soon after, when the pending vote and the next one have ended."""
    period = 5
    wishes = agreed(ranks(replicas), reported, [1000 * CONSENSUS_INTERVAL_SECONDS / period] * replicas)
    first = wishes.index(Action.STOP)
    assert 20 < first <= 20 + 2 * period
    assert set(wishes[:first]) == {Action.CONTINUE}


@pytest.mark.parametrize("replicas", [2, 3])
def test_all_save_once_on_the_same_step(ranks, replicas: int):
    """One request is one save; all replicas then wait the full time until the next one."""
    outcomes = ranks(replicas).run(votes, {replicas - 1: {20: "save"}}, [50.0] * replicas)
    for wishes, _, saved_at in outcomes:
        assert wishes == outcomes[0][0] and wishes.count(Action.CHECKPOINT) == 1
        step = wishes.index(Action.CHECKPOINT)
        assert 20 < step <= 30 and set(wishes[:step] + wishes[step + 1 :]) == {Action.CONTINUE}
        assert saved_at == pytest.approx(0.05 * (step + 1))


def test_leaving_comes_before_saving(ranks):
    """Different replicas request to save and to stop in the same vote; all stop."""
    wishes = agreed(ranks(2), {0: {20: "save"}, 1: {20: "leave"}}, [50.0, 50.0])
    assert Action.STOP in wishes and Action.CHECKPOINT not in wishes


@pytest.mark.parametrize("milliseconds", [[1.0, 1.0], [25.0, 25.0], [25.0, 1.0], [10.0, 1000.0], [1000.0, 1.0]])
def test_votes_are_a_quarter_of_a_second_apart(ranks, milliseconds: list[float]):
    """The clock of replica 0 counts; if a step takes longer, there is a vote on every step."""
    outcomes = ranks(2).run(votes, {}, milliseconds)
    steps = max(1, round(1000 * CONSENSUS_INTERVAL_SECONDS / milliseconds[0]))
    for _, periods, _ in outcomes:
        assert periods[-1] == steps
        assert periods == outcomes[0][1]


def slower_for_a_while() -> list[int]:
    """Return the periods after steps of an eightieth of a second, then an eighth, then an eightieth again."""
    with distributed() as topology, clock_by_hand() as clock:
        vote, periods = ActionConsensus(topology, LoopControl()), []
        for seconds in (0.0125, 0.125, 0.0125):
            for _ in range(90):
                clock.seconds += seconds
                vote.poll()
            periods.append(vote.period)
        vote.flush()
        return periods


def test_the_period_follows_the_steps(ranks):
    """The steps become ten times slower, and then as fast as before."""
    for outcome in ranks(2).run(slower_for_a_while):
        assert outcome == [20, 2, 20]


def leave_apart(silos: int) -> tuple[int, list[Action]]:
    """Return the silo, and the actions of its replicas if only rank 0 is preempted."""
    with distributed(silos) as topology, clock_by_hand() as clock:
        mine = LoopControl()
        vote = ActionConsensus(topology, mine)
        if topology.rank == 0:
            mine.request_stop()
        wishes = []
        for _ in range(10 + topology.silo):
            clock.seconds += 1
            wishes.append(vote.poll())
        vote.flush()
        return topology.silo, wishes


def test_silos_do_not_vote_with_each_other(ranks):
    """They take different numbers of steps; only the silo of the preempted rank stops."""
    for silo, wishes in ranks(4).run(leave_apart, 2):
        assert (Action.STOP in wishes) == (silo == 0)
