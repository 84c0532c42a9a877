"""`python -m trainer` with workers that are killed or hang, and with signals: restarts, messages, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from tests.cli.command import HERE, ROOT, Ended, Shell, Started, work
from tests.support.disk import other_owner
from trainer.checkpoint.run_dir import RunDir
from trainer.commands.train import launcher
from trainer.config.compose import compose_tree
from trainer.distributed.launch import processes
from trainer.distributed.launch.signals import MIN_SECONDS_BETWEEN_SIGNALS, STOP_SIGNALS, SignalHandler
from trainer.loggers import Metrics, read_jsonl

# The beginning of the workers of the tests.
WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

rank, restart = int(os.environ["RANK"]), int(os.environ["SILOTRAIN_RESTART"])
folder = Path(json.loads(os.environ["SILOTRAIN_CONFIG"])["run_dir"])

def state(status, **facts):
    folder.mkdir(exist_ok=True)
    aside = folder / f"aside-{rank}"
    aside.write_text(json.dumps({"status": status, **facts}))
    aside.replace(folder / "state.json")

def on_term(act):
    signal.signal(signal.SIGTERM, lambda *_: act())

def preempt():
    state("preempted")
    os._exit(0)

def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def ready():
    os.write(1, f"ready {rank}\\n".encode())  # at once: print hands over word by word, and ranks share the file
    time.sleep(60)

"""
FINAL = """
on_term(preempt)
if rank:
    time.sleep(0.2)
    state("crashed", rank=1, error="why", final=True)
    sys.exit(1)
ready()
"""
LEAVES = """
state("running", pid=1)
if {ranks}:
    os._exit(0)
time.sleep(0.3)
state("crashed", error="lost")
sys.exit(1)
"""
STOPPED = """
if rank == 0:
    state("running", pid=os.getpid())
    kill(signal.SIGSTOP)
while not (folder / "state.json").exists():
    time.sleep(0.01)
pid = json.loads((folder / "state.json").read_text())["pid"]
while Path(f"/proc/{pid}/stat").read_text().split()[2] != "T":
    time.sleep(0.01)
kill()
"""
LAUNCH = """
import signal, sys
from trainer.config.compose import compose_tree
from trainer.commands.train.launcher import launch

signal.signal(signal.SIGINT, signal.default_int_handler)  # as `python -m trainer` does: a shell may have it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
sys.exit(launch(compose_tree(sys.argv[2:]), [sys.argv[1]]))
"""
SECONDS_TO_END = 10


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def launch(run_dir: Path, worker: str, *overrides: str) -> int:
    """Return the exit code of a run with these workers."""
    script = run_dir.parent / "worker.py"
    script.write_text(WORKER + worker)
    return launcher.launch(compose_tree([*HERE, f"run_dir={run_dir}", *overrides]), [str(script)])


def state_of(run_dir: Path) -> dict[str, str | int]:
    return json.loads((run_dir / "state.json").read_text())


# Restarts


@pytest.mark.long
def test_a_run_whose_first_rank_is_killed_ends_like_one_that_was_left_alone(ranks, shell: Shell) -> None:
    """The metrics are the same to the last bit, and each round is logged once."""
    ranks(2).run(work, ["rounds=8", "run_dir=alone"], str(shell.folder))
    started = shell.start_training("rounds=8", "run_dir=killed")
    started.wait_for("round 3/8")
    os.kill(shell.worker(rank=0), signal.SIGKILL)
    ended = started.end()
    assert ended.code == 0
    assert ended.err.count("rank 0 was killed by SIGKILL; restart 1 of 3") == 1 and "Traceback" not in ended.err
    assert figures(shell.folder / "killed") == figures(shell.folder / "alone")


def figures(run_dir: Path) -> list[Metrics]:
    """Return the metrics of the run by round, without the times."""
    keys = ("round", "examples", "steps", "train/loss", "validation/loss", "test/loss", "test/accuracy")
    lines = read_jsonl(run_dir / "metrics.jsonl")
    assert len(lines) == 8
    return [{key: line[key] for key in keys} for line in lines]


def test_workers_get_the_number_of_restarts(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The number counts restarts after a failure of any rank."""
    worker = "kill() if restart == rank else state('finished') if restart == 2 else ready()"
    assert launch(run_dir, worker) == 0
    message = ["rank 0 was killed by SIGKILL; restart 1 of 3", "rank 1 was killed by SIGKILL; restart 2 of 3"]
    assert capfd.readouterr().err.splitlines() == message
    assert state_of(run_dir) == {"status": "finished"}


def test_the_number_of_restarts_is_limited(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """These workers fail before they have created the folder."""
    assert launch(run_dir, "sys.exit(3) if rank else ready()", "launch.max_restarts=1") == 1
    message = (
        f"rank 1 ended with exit code 3; restart 1 of 1\nrank 1 ended with exit code 3; continue with run_dir={run_dir}"
    )
    assert capfd.readouterr().err.splitlines() == message.splitlines()
    assert not run_dir.exists()


def test_a_final_failure_is_not_restarted(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The status of the failed worker is kept, though the other one is terminated and writes that it was preempted."""
    assert launch(run_dir, FINAL) == 1
    assert capfd.readouterr().err == ""
    assert state_of(run_dir) == {"status": "crashed", "rank": 1, "error": "why", "final": True}


@pytest.mark.parametrize("ranks", ["True", "rank"])
def test_a_rank_that_leaves_in_mid_run_is_a_crash(ranks: str, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its exit code is 0, as that of a library which calls exit; all ranks leave, or the others lose their peer."""
    worker = LEAVES.format(ranks=ranks)
    assert launch(run_dir, worker, "launch.max_restarts=1") == 1
    left = f"rank {0 if ranks == 'True' else 1} ended in mid-run, with exit code 0: something in it has called exit"
    assert capfd.readouterr().err.splitlines() == [
        f"{left}; restart 1 of 1",
        f"{left}; continue with run_dir={run_dir}",
    ]
    assert state_of(run_dir)["error"] == left and state_of(run_dir)["status"] == "crashed"


def test_workers_that_find_bad_input_before_they_begin_change_nothing(run_dir: Path) -> None:
    folder = RunDir(run_dir)
    folder.create_or_check(compose_tree([f"run_dir={run_dir}"]))
    folder.lock.release()
    folder.set_status("preempted")
    version = folder.state_version()
    assert launch(run_dir, "sys.exit(0)") == 2
    assert folder.state_version() == version


def test_a_disk_that_cannot_be_written_to_is_not_tried_again(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The worker has printed the sentence."""
    assert launch(run_dir, "state('crashed', error='full')\nsys.exit(os.EX_IOERR) if rank else time.sleep(60)") == 1
    assert capfd.readouterr().err == ""


def test_a_folder_in_use_is_refused_before_a_worker_starts(run_dir: Path) -> None:
    """The other launch is a process of this machine."""
    folder = RunDir(run_dir)
    folder.create_or_check(compose_tree([f"run_dir={run_dir}"]))
    folder.lock.release()
    with other_owner(run_dir) as process:
        with pytest.raises(ValueError, match=f"run_dir={run_dir} is in use by process {process.pid} on"):
            launch(run_dir, "kill()")
        assert folder.state() == {}


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("bad_input", 2), ("preempted", 75)])
def test_a_run_that_has_ended_is_not_restarted(
    status: str, code: int, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker dies after the end of the run."""
    assert launch(run_dir, f"state('{status}')\nif rank: kill(signal.SIGSEGV)") == code
    assert "restart" not in capfd.readouterr().err
    assert state_of(run_dir) == {"status": status}


EARLIER = [{"status": "preempted"}, {"status": "crashed", "final": True}, {"status": "finished"}]


@pytest.mark.parametrize("facts", EARLIER, ids=[facts["status"] for facts in EARLIER])
def test_the_status_of_an_earlier_start_does_not_count(
    facts: dict, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunDir(run_dir)
    folder.create_or_check(compose_tree([f"run_dir={run_dir}", "rounds=2"]))
    folder.write_result({"round": 2})
    folder.set_status(**facts)
    assert launch(run_dir, "ready() if rank else kill()", "launch.max_restarts=1", "rounds=3") == 1
    assert capfd.readouterr().err.count("restart 1 of 1") == 1
    assert state_of(run_dir) == {"status": "crashed", "rank": 0, "error": "rank 0 was killed by SIGKILL"}


def test_a_worker_that_hangs_is_ended_after_another_has_failed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stopped process does not receive SIGTERM."""
    assert processes.SHUTDOWN_TIMEOUT_SECONDS <= 10
    monkeypatch.setattr(processes, "SHUTDOWN_TIMEOUT_SECONDS", 0.5)
    begun = time.monotonic()
    assert launch(run_dir, STOPPED, "launch.max_restarts=0") == 1
    assert 0.5 < time.monotonic() - begun < SECONDS_TO_END
    assert capfd.readouterr().err.startswith("rank 1 was killed by SIGKILL")


def test_a_rank_that_was_killed_is_named_before_one_that_lost_its_peer() -> None:
    """Both end between two polls of the launcher."""
    workers = processes.Workers(SignalHandler())
    for end in ("exit(1)", "import os; os.kill(os.getpid(), 9)"):
        workers.start(["-c", end], os.environ)
    for process in workers._processes:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert workers.wait() == processes.WorkerFailure(1, -signal.SIGKILL)


@pytest.mark.long
def test_two_launches_at_a_time_do_not_meet(shell: Shell) -> None:
    runs = [shell.start_training("rounds=2", f"run_dir=pair-{number}") for number in (1, 2)]
    assert [(run.process.wait(60), run.err.read_text()) for run in runs] == [(0, "")] * 2
    first, second = (json.loads((shell.folder / f"pair-{number}/result.json").read_text()) for number in (1, 2))
    assert first["test/loss"] == second["test/loss"]
    runs[0].end()


# Signals


def start(shell: Shell, worker: str, *overrides: str) -> Started:
    """Start a launcher with these workers, and wait until both are ready."""
    (shell.folder / "launch.py").write_text(LAUNCH)
    (shell.folder / "worker.py").write_text(f"{WORKER}{worker}\nready()")
    started = shell.start("launch.py", "worker.py", *HERE, *overrides)
    for rank in (0, 1):
        started.wait_for(f"ready {rank}")
    return started


def send(started: Started, number: signal.Signals, within_seconds: float = SECONDS_TO_END) -> Ended:
    started.process.send_signal(number)
    return started.end(within_seconds)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.quick_rows(2)
def test_a_signal_lets_the_workers_save_and_leave(number: signal.Signals, shell: Shell) -> None:
    """They get SIGTERM once, and have time to save; a signal that arrives twice at once counts as one."""
    run_dir = f"signal-{number.name}"
    started = start(shell, "on_term(lambda: (time.sleep(1.5), preempt()))", f"run_dir={run_dir}")
    started.process.send_signal(number)
    time.sleep(0.2)
    ended = send(started, number)
    notice = f"{number.name}: the workers save and stop; a second signal ends them at once"
    assert ended.code == 75
    assert ended.err.splitlines() == [notice, f"preempted; continue with run_dir={run_dir}"]
    assert state_of(shell.folder / run_dir) == {"status": "preempted"}


def test_workers_that_have_not_begun_are_preempted(shell: Shell) -> None:
    """They have no handler while they import."""
    ended = send(start(shell, "state('running')", "run_dir=early"), signal.SIGTERM)
    assert ended.code == 75 and ended.err.endswith("continue with run_dir=early\n")
    assert state_of(shell.folder / "early") == {"status": "preempted"}


def test_a_worker_that_fails_after_a_signal_is_not_restarted(shell: Shell) -> None:
    ended = send(start(shell, "on_term(lambda: os._exit(rank))", "run_dir=fails"), signal.SIGTERM)
    assert ended.code == 1 and "restart" not in ended.err
    assert ended.err.splitlines()[1:] == ["rank 1 ended with exit code 1; continue with run_dir=fails"]


@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
def test_a_second_signal_ends_the_workers_at_once(saved: bool, code: int, shell: Shell) -> None:
    """Workers that do not exit are killed, with the processes that they have started."""
    run_dir = f"twice-{code}"
    act = "state('preempted')" if saved else "None"
    started = start(shell, f"on_term(lambda: {act})\nsubprocess.Popen(['sleep', '60'])", f"run_dir={run_dir}")
    started.process.send_signal(signal.SIGINT)
    time.sleep(MIN_SECONDS_BETWEEN_SIGNALS + 0.2)
    assert started.process.poll() is None
    ended = send(started, signal.SIGTERM, within_seconds=5)
    assert ended.code == code and ended.err.endswith(f"continue with run_dir={run_dir}\n")


def listening(pids: list[int]) -> set[str]:
    """Return the addresses, as the kernel writes them, at which these processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed meanwhile
                sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@pytest.mark.long
def test_workers_leave_when_their_launcher_is_killed(shell: Shell) -> None:
    """They save first, as after a preemption. Before, nothing of the run listens beyond this machine."""
    started = shell.start_training("rounds=2000", "run_dir=orphans", "algorithm=fedavg", "silos=2")
    started.wait_for("round    1/2000")
    assert listening(shell.running()) == {"0100007F"}, "127.0.0.1"
    started.process.kill()
    deadline = time.monotonic() + SECONDS_TO_END
    while shell.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.end().code == -signal.SIGKILL
    assert state_of(shell.folder / "orphans")["status"] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_workers_that_have_just_begun_end_with_their_launcher(number: signal.Signals, shell: Shell) -> None:
    """They have no handler yet. SIGHUP is that of a terminal that is closed."""
    began = "from trainer.__main__ import _become_worker\n_become_worker()"
    ended = send(start(shell, began, f"run_dir=begun-{number.name}"), number)
    assert ended.code == -number, "no process was left after two seconds"


def test_a_worker_whose_launcher_has_died_before_it_ends_at_once(tmp_path: Path) -> None:
    """The kernel sends a signal only for parents that die later. The one of this worker is another process."""
    environment = {**os.environ, "RANK": "0", "SILOTRAIN_LAUNCHER_PID": str(os.getppid())}
    worker = subprocess.run([sys.executable, *processes.TRAINER], env=environment, cwd=tmp_path, timeout=30)
    assert worker.returncode == 75 and not [*tmp_path.iterdir()]


def test_the_command_is_the_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`silotrain --help` prints the same as `python -m trainer --help`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["silotrain"].split(":")
    monkeypatch.setattr(sys, "argv", ["silotrain", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command changes it
    assert getattr(import_module(module), name)() == 0
    assert "python -m trainer" in capsys.readouterr().out
