"""Entry point of `python -m trainer`, under torchrun and srun too, and of the command `silotrain`."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from trainer.distributed.environment import LAUNCHER_PID, PARENT_PID, is_worker
from trainer.utils.output import keep_output_harmless

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run() -> int:
    """Run the command line, or a worker; return the exit code. Slow imports come where Control-C is quiet."""
    keep_output_harmless()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch prints thirty lines for a lost peer, we print one
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
    """Import the command line. Meanwhile Control-C ends the process: imports may swallow a KeyboardInterrupt."""
    if parent := os.environ.get(PARENT_PID):
        _leave_with_parent(int(parent))
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from trainer.commands.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main


def _become_worker() -> None:
    """Set the signals of a worker until it handles them itself: it ends with its launcher, and silently."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # our launcher passes it on as SIGTERM
    _leave_with_parent(int(launcher))


def _leave_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when the one that started it dies; end now if it is dead."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    sys.exit(run())
