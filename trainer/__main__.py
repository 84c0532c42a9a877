"""`python -m trainer`, under torchrun and srun too, and the command `silotrain`."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from trainer.distributed.environment import is_worker

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run() -> int:
    """The exit code of the command line. Whatever may take time is imported where Control-C is quiet."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # thirty lines for a lost peer, of which we say one
    if is_worker(sys.argv):
        _become_worker()
        from trainer.commands.main import main
    else:
        main = _main_of_launcher()
    try:
        return main()
    except KeyboardInterrupt:
        return 130


def _main_of_launcher() -> Callable[[], int]:
    """The command line. While it is imported Control-C ends the process: imports may swallow a KeyboardInterrupt."""
    if "SILOTRAIN_SWEPT" in os.environ:
        _leave_with_parent()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from trainer.commands.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main


def _become_worker() -> None:
    """Until the worker takes signals itself: it leaves with its launcher, and without a word."""
    if "SILOTRAIN_RESTART" not in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our launcher passes it on as SIGTERM
    _leave_with_parent()


def _leave_with_parent() -> None:
    """When the process that started this one is killed, this one is told to leave."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run())
