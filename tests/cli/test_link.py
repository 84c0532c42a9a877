"""A link between two hosts that goes down: both sides report it, and the run is resumed when the link is up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.network_namespaces import Host, new_hosts, why_not
from tests.cli.command import Ended, Shell, Started, work
from tests.cli.test_preemption import MODELS, OWN, assert_same_run

TIMEOUT_SECONDS = 8
SECONDS_TO_SAY_SO = 12  # for the steps of a round, the diagnosis, and torchrun
OUTAGE_SECONDS = 3
ROUNDS = 5
FEDERATED = (*OWN, "algorithm=fedavg", "silos=2", f"rounds={ROUNDS}")
WATCHFUL = ("checkpoint.every_seconds=0.2", f"launch.inter_silo_timeout_seconds={TIMEOUT_SECONDS}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts with a link between them."""
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    with new_hosts(2) as made:
        yield made


@pytest.fixture
def shells(new_shell: Callable[[], Shell]) -> list[Shell]:
    """Return a folder on each host."""
    made = [new_shell(), new_shell()]
    for shell in made:
        (shell.folder / "own.py").write_text(MODELS)
    return made


@pytest.fixture(scope="module")
def alone(ranks, shell: Shell) -> Path:
    """Run the same on one host."""
    (shell.folder / "own.py").write_text(MODELS)
    ranks(2).run(work, [*FEDERATED, "+model.seconds=0", "run_dir=alone"], str(shell.folder))
    return shell.folder / "alone"


def start(hosts: list[Host], shells: list[Shell], folder: Path) -> list[Started]:
    """Start one silo on each host; `folder` is on a disk that both share."""
    first = hosts[0].address

    def node(host: Host, shell: Shell) -> Started:
        options = ("--nnodes", "2", "--node-rank", str(host.number), "--nproc-per-node", "1", "--master-addr", first)
        return shell.start_torchrun(*FEDERATED, *WATCHFUL, f"run_dir={folder}", options=options, inside=host.inside)

    return [node(host, shell) for host, shell in zip(hosts, shells, strict=True)]


def end(nodes: list[Started], within_seconds: float = 120) -> list[Ended]:
    """Wait for the end of both, within the time limit."""
    deadline = time.monotonic() + within_seconds
    return [node.end(max(0, deadline - time.monotonic())) for node in nodes]


@pytest.mark.long
def test_both_sides_end_and_go_on_when_the_link_is_up_again(
    hosts: list[Host], shells: list[Shell], alone: Path, tmp_path: Path
) -> None:
    """The link goes down in the middle of a round.

    Each host reports what it waited for; the result is that of the run alone.
    """
    folder = tmp_path / "run"
    nodes = start(hosts, shells, folder)
    nodes[0].wait_for(f"round 2/{ROUNDS}")
    time.sleep(0.3)
    hosts[1].unplug()
    try:
        first, second = end(nodes, within_seconds=TIMEOUT_SECONDS + SECONDS_TO_SAY_SO)
    finally:
        hosts[1].plug()
    assert first.code == second.code == 1
    assert "rank 0 waited in vain while round 3: combining with the other silos" in first.err, first.err
    assert "rank 1 has not been heard from for" in first.err
    assert "rank 1 waited in vain while round 3: combining with the other silos" in second.err, second.err
    assert "Broken pipe" not in second.err
    assert json.loads((folder / "state.json").read_text())["status"] == "crashed"

    nodes = start(hosts, shells, folder)
    first, second = end(nodes)
    assert first.code == second.code == 0, first.err + second.err
    assert "continues from round 2, silo 0 at step-" in first.out, first.out
    assert_same_run(folder, alone)


@pytest.mark.long
def test_a_link_that_is_up_again_in_time_only_delays(
    hosts: list[Host], shells: list[Shell], alone: Path, tmp_path: Path
) -> None:
    """An outage shorter than launch.inter_silo_timeout_seconds is only a longer wait."""
    folder = tmp_path / "run"
    nodes = start(hosts, shells, folder)
    nodes[0].wait_for(f"round 1/{ROUNDS}")
    hosts[1].unplug()
    time.sleep(OUTAGE_SECONDS)
    assert f"round 3/{ROUNDS}" not in nodes[0].out.read_text(), "no round ends without the link"
    hosts[1].plug()
    first, second = end(nodes)
    assert first.code == second.code == 0, first.err + second.err
    assert "continues from" not in first.out
    assert_same_run(folder, alone)
