"""Commands as a user types them, in a folder of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120
SECONDS_TO_FOLLOW = 2  # for workers whose launcher has ended
HERE = ("launch.nproc_per_node=2", "launch.threads_per_worker=1", "launch.device=cpu")
FOREIGN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "LOGLEVEL")


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, and what it wrote on its standard output and error."""

    code: int
    out: str
    err: str


def named_choices(group: str) -> list[str]:
    """The choices of a group of the configuration, without `custom`, which is not complete by itself."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if path.stem != "custom")


def work(overrides: list[str]) -> None:
    """What a worker does with these overrides, in a world of live ranks: milliseconds, where a start takes seconds."""
    import torch.distributed as dist

    from trainer.commands.train import worker
    from trainer.config.compose import compose_tree
    from trainer.distributed import collectives

    rank, size = dist.get_rank(), dist.get_world_size()
    place = worker.ClusterEnvironment(rank, size, rank, size)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(worker, "detect_environment", lambda: place),
        patch.object(worker, "open_store", lambda place: dist.FileStore(path, size)),  # pyright: ignore
    ):
        path = collectives.broadcast_text(f"{folder}/store")
        worker.main(lambda: compose_tree(["launch.threads_per_worker=1", "launch.device=cpu", *overrides]))
        collectives.barrier()  # rank 0's folder is everybody's


class Shell:
    """Starts commands in a folder, and sees which of their processes are still there."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache

    def train(self, *overrides: str) -> Ended:
        """`python -m trainer` on two workers of one thread, run to its end."""
        return self.start_training(*overrides).end()

    def torchrun(self, *overrides: str, options: tuple[str, ...] = ("--standalone", "--nproc-per-node", "2")) -> Ended:
        """`torchrun -m trainer`, run to its end; the last of the `options` may say where the ranks are."""
        return self.start_torchrun(*overrides, options=options).end()

    def start_training(self, *overrides: str) -> Started:
        return self.start("-m", "trainer", *HERE, *overrides)

    def start_torchrun(self, *overrides: str, options: tuple[str, ...], inside: tuple[str, ...] = ()) -> Started:
        return self.start("-m", "torch.distributed.run", *options, "-m", "trainer", *HERE, *overrides, inside=inside)

    def start(self, *arguments: str, inside: tuple[str, ...] = ()) -> Started:
        """Python with these arguments; `inside` comes before it, if it is to run on another host."""
        return Started(self, arguments, inside)

    def running(self) -> list[int]:
        """The processes that work in this folder, whoever started them."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is another user's
                if (process / "cwd").readlink() == self.folder:
                    found.append(int(process.name))
        return found

    def worker(self, rank: int) -> int:
        """The process of this rank."""
        marked = f"\0RANK={rank}\0".encode()
        (found,) = (pid for pid in self.running() if marked in Path(f"/proc/{pid}/environ").read_bytes())
        return found


class Started:
    """A command under way, in a process group of its own as a terminal would give it."""

    def __init__(self, shell: Shell, arguments: tuple[str, ...], inside: tuple[str, ...] = ()):
        self.shell, self.arguments = shell, arguments
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        # Unless told otherwise torchrun says at length that it chooses one thread.
        environment = kept | {"PYTHONPATH": str(ROOT), "SILOTRAIN_CACHE": str(shell.cache), "OMP_NUM_THREADS": "1"}
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

    def wait_for(self, text: str) -> None:
        """Returns when the standard output holds the text."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in self.out.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)

    def press_control_c(self) -> None:
        """What a terminal does to its foreground processes."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, within_seconds: float = DEADLINE_SECONDS) -> Ended:
        """How it ended, in time, and with nothing left running."""
        try:
            code = self.process.wait(within_seconds)
        finally:
            left = self._end_the_rest()
        assert not left, f"{self.arguments}: still running: {left}"
        return Ended(code, self.out.read_text(), self.err.read_text())

    def _end_the_rest(self) -> list[int]:
        """What is still running after a moment, and is not any more."""
        deadline = time.monotonic() + SECONDS_TO_FOLLOW
        while (left := self.shell.running()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left
