"""Several nodes with a launcher each: one may be lost and come back, be preempted, or be misconfigured.

Here they are simulated on one machine; tests/slurm has them on a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.command import DEADLINE_SECONDS, Shell, Started, work
from trainer.checkpoint.run_dir import RunDir
from trainer.commands import main as cli
from trainer.loggers import read_jsonl

NODE = ("-m", "trainer", "launch.nproc_per_node=1", "launch.threads_per_worker=1", "launch.device=cpu")
FEDERATED = ("algorithm=fedavg", "silos=2")


@pytest.fixture
def where() -> str:
    """Return a free rendezvous endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"launch.rdzv_endpoint=localhost:{free.getsockname()[1]}"


def start(shell: Shell, nodes: str, *overrides: str) -> Started:
    return shell.start(*NODE, f"launch.nodes={nodes}", *overrides)


def start_host(shell: Shell, nodes: str, *overrides: str) -> Started:
    """Start the node that holds the store: on one machine that is the first node to start."""
    started = start(shell, nodes, *overrides)
    port = int(next(o for o in overrides if o.startswith("launch.rdzv_endpoint")).rpartition(":")[2])
    while started.process.poll() is None:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
    return started


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["train/loss"], line["test/loss"]) for line in read_jsonl(run_dir / "metrics.jsonl")]


@pytest.mark.long
def test_two_nodes_of_one_rank_are_one_node_of_two(ranks, shell: Shell, where: str) -> None:
    run = ("rounds=3", *FEDERATED)
    ranks(2).run(work, ["run_dir=one", *run], str(shell.folder))
    nodes = [start(shell, "2", "run_dir=two", where, *run) for _ in range(2)]
    assert [(node.process.wait(60), node.err.read_text()) for node in nodes] == [(0, "")] * 2
    nodes[0].end()
    one, two = shell.folder / "one", shell.folder / "two"
    assert losses(one) == losses(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def kill(node: Started) -> None:
    """Kill the launcher and its workers at once, as if the machine failed."""
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    for pid in (node.process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    node.process.wait()


def wait_until(node: Started, seen: Callable[[str], bool]) -> None:
    """Wait until the output of the node meets the condition."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not seen(node.out.read_text()):
        assert node.process.poll() is None and time.monotonic() < deadline, node.err.read_text()
        time.sleep(0.05)


def after(out: str, *silos: str) -> str:
    """Return the output after the line of a start with these silos."""
    for sizes in silos:
        out = out.partition(f"replicas in the silos: {sizes}\n")[2]
    return out


@pytest.mark.long
def test_a_node_that_is_lost_is_done_without_and_one_that_comes_joins(shell: Shell, where: str) -> None:
    """Meanwhile there are fewer silos and the same clients; no saved round is trained again."""
    run = ("rounds=100000", "run_dir=elastic", where, *FEDERATED)
    first = start_host(shell, "[1,2]", *run)
    second = start(shell, "[1,2]", *run)
    wait_until(first, lambda out: out.count("round ") > 2)
    kill(second)
    wait_until(first, lambda out: "round " in after(out, "[1,1]", "[1]"))
    third = start(shell, "[1,2]", *run)
    wait_until(first, lambda out: "round " in after(out, "[1,1]", "[1]", "[1,1]"))
    third.process.send_signal(signal.SIGTERM)
    assert [node.process.wait(30) for node in (first, third)] == [75, 75]
    ended = first.end()
    assert ended.out.count("replicas in the silos: ") == ended.out.count("\nclients   2") == 3
    assert "Traceback" not in ended.err and ended.err.count("a node is lost, or one more has come; restarted") == 2
    rounds = [line["round"] for line in read_jsonl(shell.folder / "elastic/metrics.jsonl")]
    assert rounds == list(range(1, len(rounds) + 1))


@pytest.mark.long
def test_a_run_that_is_told_to_stop_on_one_node_goes_on_to_the_same_bits(ranks, shell: Shell, where: str) -> None:
    """The run is resumed on one node of two ranks."""
    run = ("rounds=12", *FEDERATED)
    stop(*[start(shell, "2", "run_dir=stopped", where, *run) for _ in range(2)])
    assert shell.train("run_dir=stopped", *run).code == 0
    ranks(2).run(work, ["run_dir=whole", *run], str(shell.folder))
    stopped, whole = (shell.folder / name / "model.safetensors" for name in ("stopped", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()


def tells_of_rounds(node: Started) -> bool:
    """Return whether this is the node of rank 0, and a round has ended."""
    return "train loss" in node.out.read_text()


def wait_for_a_round(nodes: Sequence[Started]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not any(map(tells_of_rounds, nodes)):
        assert time.monotonic() < deadline, [node.err.read_text() for node in nodes]
        time.sleep(0.05)


def stop(*nodes: Started) -> None:
    """Preempt the last of the nodes after a round, and check that all of them stop."""
    wait_for_a_round(nodes)
    nodes[-1].process.send_signal(signal.SIGUSR1)
    assert [node.process.wait(30) for node in nodes] == [75] * len(nodes)


@pytest.mark.long
@pytest.mark.parametrize(
    "algorithm",
    [("algorithm=scaffold", "silos=2"), ("algorithm=sync",)],
    ids=["a state for each client", "a silo over both"],
)
def test_nodes_without_a_common_disk_go_on_from_what_each_has(
    ranks, algorithm: tuple[str, ...], new_shell: Callable[[], Shell], where: str
) -> None:
    """One of them has lost its newest checkpoints; nothing is copied between the disks."""
    shells = [new_shell(), new_shell()]
    run = ("rounds=12", "run_dir=run", where, *algorithm)
    stop(*[start(shell, "2", *run) for shell in shells])
    for folder in sorted((shells[1].folder / "run/checkpoints").glob("round-*"))[1:]:
        shutil.rmtree(folder)
    nodes = [start(shell, "2", *run) for shell in shells]
    assert [node.process.wait(90) for node in nodes] == [0, 0]
    message = [line for node in nodes for line in node.err.read_text().splitlines()]
    assert all(line.startswith("skipped: ") and line.endswith("is not whole") for line in message)
    assert any("continues from round" in node.out.read_text() for node in nodes)
    whole = new_shell()
    ranks(2).run(work, [*run[:2], *algorithm], str(whole.folder))
    models = [shell.folder / "run/model.safetensors" for shell in (*shells, whole)]
    assert len({model.read_bytes() for model in models}) == 1


SINKS = """
import atexit
import time

class SlowToClose:
    def __init__(self, folder, settings):
        pass

    def log_round(self, metrics):
        pass

    def finalize(self, result, artifacts):
        pass

    def close(self):
        time.sleep(3)

class SlowToExit(SlowToClose):
    def close(self):
        atexit.register(time.sleep, 6)
"""
SLOW_TO_CLOSE, SLOW_TO_EXIT = (f"+loggers.slow={{_target_: own.{name}}}" for name in ("SlowToClose", "SlowToExit"))
AVERAGING = ("algorithm=averaging", "silos=2")


@pytest.mark.long
def test_a_node_whose_ranks_are_done_waits_until_the_run_is_said_to_be_finished(shell: Shell, where: str) -> None:
    """Regression: its launcher read the status of the run too early, and took it for one with bad input."""
    (shell.folder / "own.py").write_text(SINKS)
    nodes = [start(shell, "2", "rounds=1", "run_dir=done", where, SLOW_TO_CLOSE, *AVERAGING) for _ in range(2)]
    assert [(node.process.wait(60), node.err.read_text()) for node in nodes] == [(0, "")] * 2
    assert RunDir(shell.folder / "done").status() == "finished"


@pytest.mark.long
def test_a_node_whose_ranks_have_left_waits_until_the_run_is_said_to_be_preempted(shell: Shell, where: str) -> None:
    (shell.folder / "own.py").write_text(SINKS)
    stop(*[start(shell, "2", "rounds=100000", "run_dir=left", where, SLOW_TO_CLOSE, *AVERAGING) for _ in range(2)])
    assert RunDir(shell.folder / "left").status() == "preempted"


@pytest.mark.long
def test_a_node_whose_ranks_take_longer_to_exit_does_not_take_the_others_for_lost(shell: Shell, where: str) -> None:
    """Regression: it started again, found that the run had ended, and exited with 1 instead of 75."""
    (shell.folder / "own.py").write_text(SINKS)
    nodes = [start(shell, "2", "rounds=100000", "run_dir=slow", where, SLOW_TO_EXIT, *AVERAGING) for _ in range(2)]
    wait_for_a_round(nodes)
    stop(*sorted(nodes, key=tells_of_rounds, reverse=True))


@pytest.mark.long
def test_a_folder_that_has_to_be_shared_is_looked_for(new_shell: Callable[[], Shell], where: str) -> None:
    nodes = [start(new_shell(), "2", "run_dir=run", "require_shared_run_dir=true", where) for _ in range(2)]
    assert [node.process.wait(60) for node in nodes] == [2, 2]
    message = "".join(node.err.read_text() for node in nodes)
    assert message.count("run_dir=run is not one folder on all nodes, though require_shared_run_dir=true") == 1


@pytest.mark.long
def test_a_node_that_waits_for_others_can_be_told_to_stop(shell: Shell, where: str) -> None:
    node = start_host(shell, "2", "run_dir=lonely", where)
    node.process.send_signal(signal.SIGTERM)
    ended = node.end()
    assert (ended.code, ended.err) == (75, "stopped before the other nodes had joined\n")
    assert not (shell.folder / "lonely").exists()


@pytest.mark.parametrize("meet", ["null", "node7", "no.such.host.:29500", "[::1]"])
def test_nodes_have_to_be_told_where_they_meet(meet: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*NODE[2:], "launch.nodes=2", "run_dir=none", f"launch.rdzv_endpoint={meet}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("launch.rdzv_endpoint") and meet.split(":")[0] in message and "Traceback" not in message
