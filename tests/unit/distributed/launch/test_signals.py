"""Stop signals: when they are recorded, what is called, and that the handlers are restored."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from threading import Event

import pytest

from trainer.distributed.launch.signals import MIN_SECONDS_BETWEEN_SIGNALS, STOP_SIGNALS, handle_stop_signals


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Install default handlers: a shell may have the process ignore SIGINT, and pytest handles it."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_last_signal_of_a_block_is_recorded_too(number: signal.Signals) -> None:
    with handle_stop_signals() as handler:
        assert handler.signal is None
        signal.raise_signal(number)
    assert handler.signal is number and not handler.kill_requested
    assert signal.getsignal(number) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


def test_a_later_signal_kills_and_one_delivered_twice_does_not() -> None:
    stopped, killed = Event(), Event()
    with handle_stop_signals(stopped.set, killed.set) as handler:
        signal.raise_signal(signal.SIGTERM)
        assert stopped.wait(5)
        signal.raise_signal(signal.SIGUSR1)
        assert not killed.wait(MIN_SECONDS_BETWEEN_SIGNALS + 0.2) and not handler.kill_requested
        signal.raise_signal(signal.SIGUSR1)
        assert killed.wait(5) and handler.kill_requested
    assert handler.signal is signal.SIGTERM


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handle_stop_signals() as handler:
        signal.raise_signal(signal.SIGINT)
    assert handler.signal is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_signals_with_a_handler_are_not_stop_signals() -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGWINCH, lambda number, frame: handled.append(number))
    try:
        with handle_stop_signals() as handler:
            signal.raise_signal(signal.SIGWINCH)
    finally:
        signal.signal(signal.SIGWINCH, before)
    assert handled == [signal.SIGWINCH] and handler.signal is None
