"""Workers that torchrun starts, on one machine and on several."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import yaml

from tests.cli.command import Ended, Shell
from trainer.loggers import Metrics

FEDAVG = ("algorithm=fedavg", "partition=dirichlet", "rounds=2", "metrics.per_client=none")


def result_of(folder: Path) -> Metrics:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def one_machine(shell: Shell) -> Ended:
    """Run two silos of one worker each on one machine."""
    return shell.torchrun(*FEDAVG, "silos=2", "run_dir=one")


def test_a_run_under_torchrun_finishes(one_machine: Ended, shell: Shell) -> None:
    assert (one_machine.code, one_machine.err) == (0, "")
    assert "replicas in the silos: [1,1]" in one_machine.out and one_machine.out.count("round 2/2") == 1
    assert json.loads((shell.folder / "one/state.json").read_text())["status"] == "finished"
    assert 0 < result_of(shell.folder / "one")["test/accuracy"] <= 1


def test_a_run_that_hides_clients_shows_none(one_machine: Ended, shell: Shell) -> None:
    """With metrics.per_client=none neither the console nor the files have metrics of single clients."""
    assert "validation  test" not in one_machine.out, "the table of labels"
    metrics = (shell.folder / "one/metrics.jsonl").read_text()
    assert '"client/' not in metrics and "worst" not in metrics
    assert '"delta/norm"' in metrics, "metrics of all clients together are logged"


@pytest.mark.long
def test_bad_input_is_printed_once_and_the_workers_end_well(shell: Shell) -> None:
    """The exit code is 0, since torchrun would restart the workers and report every rank. state.json has the status."""
    ended = shell.torchrun(*FEDAVG, "silos=2", "model.classes=7", "clients=1", "run_dir=bad")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err.count("clients=1") == 1 and "Traceback" not in ended.err
    assert json.loads((shell.folder / "bad/state.json").read_text())["status"] == "bad_input"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.long
def test_two_machines_with_a_silo_each_are_two_silos_on_one(one_machine: Ended, shell: Shell) -> None:
    """The losses are the same to the last bit; only the machine of rank 0 prints progress."""
    port = str(free_port())

    def agent(node: int) -> tuple[str, ...]:
        where = ("--master-addr", "127.0.0.1", "--master-port", port)
        return ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *where)

    nodes = [shell.start_torchrun(*FEDAVG, "silos=node", "run_dir=two", options=agent(node)) for node in (0, 1)]
    for node in nodes:
        assert node.process.wait(120) == 0, node.err.read_text()
    first, second = (node.end() for node in nodes)
    assert (second.out, _from_workers(first.err), _from_workers(second.err)) == ("", "", "")
    assert "replicas in the silos: [1,1]" in first.out
    ours, theirs = result_of(shell.folder / "two"), result_of(shell.folder / "one")
    compared = [key for key in theirs if "second" not in key and not key.startswith(("memory/", "system/"))]
    assert {key: ours[key] for key in compared} == {key: theirs[key] for key in compared}
    assert yaml.safe_load((shell.folder / "two/config.yaml").read_text())["silos"] == "node"
    assert {path.name for path in (shell.folder / "two/logs").iterdir()} == {"rank-0.log", "rank-1.log", "starts.json"}


def _from_workers(err: str) -> str:
    """Return the lines but those of torchrun's agents, of which the last finds the store of the first one closed."""
    return "".join(line for line in err.splitlines(keepends=True) if "torch/distributed/elastic/agent/" not in line)


@pytest.mark.long
def test_torchrun_restarts_a_run(shell: Shell) -> None:
    """Its store outlives the workers, so the entries of the previous start must not count."""
    options = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    started = shell.start_torchrun("rounds=12", "run_dir=restarted", options=options)
    started.wait_for("round  3/12")
    os.kill(shell.worker(rank=1), signal.SIGKILL)
    ended = started.end()
    assert ended.code == 0, ended.err
    assert "continues from round" in ended.out
    lines = (shell.folder / "restarted/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, 13))
