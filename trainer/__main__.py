"""`python -m trainer`, `torchrun -m trainer` and the command `silotrain`."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run() -> int:
    """The exit code of the command line. Whatever may take time is imported where Control-C is quiet."""
    if "RANK" in os.environ:
        _become_worker()
    try:
        from trainer.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


def _become_worker() -> None:
    """Until the worker takes signals itself: it leaves with its launcher, and without a word."""
    if "SILOTRAIN_RESTART" not in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our launcher passes it on as SIGTERM
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # when the launcher is killed


if __name__ == "__main__":
    sys.exit(run())
