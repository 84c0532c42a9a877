"""Workers that are forked from their launcher, which has imported torch: a start takes tenths of a second."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch._dynamo
import torch.distributed.fsdp  # noqa: F401 (both, as the first optimizer of a worker and a model in parts would)

import trainer.commands.train.worker  # noqa: F401 (once, for all workers)


class ForkedWorker:
    """A forked process, with the part of `subprocess.Popen` that the launcher uses.

    Nothing of the launcher is left in it but its modules: neither signal handlers nor open files. The command, an
    interpreter and its arguments, is not executed.
    """

    def __init__(
        self,
        work: Callable[[], int],
        command: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int],
        **_: bool,
    ):
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(work, [command[-1]], env, pass_fds)

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that killed it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def _become(work: Callable[[], int], argv: list[str], env: Mapping[str, str], pass_fds: Sequence[int]) -> None:
    """Run `work` as a process that has just been started would, and end with its exit code."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in pass_fds:
                with suppress(OSError):  # the one that listed them
                    os.close(descriptor)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
