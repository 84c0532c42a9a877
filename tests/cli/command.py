"""Commands as a user types them, in temporary folders."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120
SECONDS_TO_FOLLOW = 2  # until workers follow a launcher that has ended
HERE = ("launch.nproc_per_node=2", "launch.threads_per_worker=1", "launch.device=cpu")
FOREIGN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "LOGLEVEL")


@dataclass(frozen=True)
class Ended:
    """The exit code, the standard output and the standard error of a command."""

    code: int
    out: str
    err: str


def named_choices(group: str) -> list[str]:
    """Return the choices of a group of the configuration, except `custom`, which is incomplete by itself."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem != "custom")


def work(overrides: list[str], folder: str = ".") -> None:
    """Run a worker with these overrides on live ranks. This takes milliseconds; starting processes takes seconds.

    Args:
        overrides: of the configuration
        folder: the working directory, from which modules of the user are imported
    """
    import torch.distributed as dist

    from trainer.commands.train import worker
    from trainer.config.compose import compose_tree
    from trainer.distributed import collectives
    from trainer.distributed.store import SignedStore

    rank, size = dist.get_rank(), dist.get_world_size()
    place = worker.ClusterEnvironment(rank, size, rank, size)
    with (
        tempfile.TemporaryDirectory() as temporary,
        chdir(folder),
        patch.object(sys, "path", [folder, *sys.path]),
        patch.object(worker, "detect_environment", lambda: place),
        patch.object(worker, "open_store", lambda *_: SignedStore(dist.FileStore(path, size), b"")),  # pyright: ignore
    ):
        path = collectives.broadcast_text(f"{temporary}/store")
        own = ["launch.threads_per_worker=1", "launch.device=cpu", *overrides]
        worker.main(lambda: compose_tree(own), own)
        collectives.barrier()  # all ranks use rank 0's folder
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{folder}/"):
            del sys.modules[name]  # another test has a module of this name


def printed_by_work(overrides: list[str], folder: str = ".") -> str:
    """Run a worker as `work` does; return what this rank prints."""
    with redirect_stdout(io.StringIO()) as output:
        work(overrides, folder)
    return output.getvalue()


class Shell:
    """Starts commands in a folder, and finds their running processes."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        self.started: list[subprocess.Popen[bytes]] = []

    def train(self, *overrides: str) -> Ended:
        """Run `python -m trainer` on two workers of one thread."""
        return self.start_training(*overrides).end()

    def torchrun(self, *overrides: str, options: tuple[str, ...] = ("--standalone", "--nproc-per-node", "2")) -> Ended:
        """Run `torchrun -m trainer`; the last of the `options` may choose the nodes and ranks."""
        return self.start_torchrun(*overrides, options=options).end()

    def start_training(self, *overrides: str) -> Started:
        return self.start("-m", "trainer", *HERE, *overrides)

    def start_torchrun(self, *overrides: str, options: tuple[str, ...], inside: tuple[str, ...] = ()) -> Started:
        return self.start("-m", "torch.distributed.run", *options, "-m", "trainer", *HERE, *overrides, inside=inside)

    def start(self, *arguments: str, inside: tuple[str, ...] = ()) -> Started:
        """Start Python with these arguments; `inside` is put before them to run on another host."""
        return Started(self, arguments, inside)

    def running(self) -> list[int]:
        """Return the processes that work in this folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has ended, or belongs to another user
                if (process / "cwd").readlink() == self.folder:
                    found.append(int(process.name))
        return found

    def end_all(self) -> None:
        """Kill the commands that are still running, with their processes, as a failed test leaves them."""
        left = [process for process in self.started if process.poll() is None]
        self.started.clear()
        if left:
            self.kill(self.running())
        for process in left:
            process.wait()

    def kill(self, processes: list[int]) -> None:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def worker(self, rank: int) -> int:
        """Return the process of this rank."""
        marked = f"\0RANK={rank}\0".encode()
        (found,) = (pid for pid in self.running() if marked in Path(f"/proc/{pid}/environ").read_bytes())
        return found


class Started:
    """A running command, in a new process group, as in a terminal."""

    def __init__(self, shell: Shell, arguments: tuple[str, ...], inside: tuple[str, ...] = ()):
        self.shell, self.arguments = shell, arguments
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        # Without this, torchrun prints a long warning that it chooses one thread.
        environment = kept | {"PYTHONPATH": str(ROOT), "SILOTRAIN_CACHE": str(shell.cache), "OMP_NUM_THREADS": "1"}
        environment["XDG_CONFIG_HOME"] = str(shell.cache)  # of the token
        number = len(list(shell.folder.glob("*.out")))
        self.out, self.err = shell.folder / f"{number}.out", shell.folder / f"{number}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*inside, sys.executable, *arguments],
                cwd=shell.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        shell.started.append(self.process)

    def wait_for(self, text: str) -> None:
        """Wait until the standard output contains the text."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in self.out.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)

    def press_control_c(self) -> None:
        """Send SIGINT to the process group, as a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, within_seconds: float = DEADLINE_SECONDS) -> Ended:
        """Wait for the end, and check that no process is left."""
        try:
            code = self.process.wait(within_seconds)
        finally:
            left = self._end_the_rest()
        assert not left, f"{self.arguments}: still running: {left}"
        return Ended(code, self.out.read_text(), self.err.read_text())

    def _end_the_rest(self) -> list[int]:
        """Kill and return the processes that are still running after a moment."""
        deadline = time.monotonic() + SECONDS_TO_FOLLOW
        while (left := self.shell.running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.shell.kill(left)
        self.process.wait()
        return left
