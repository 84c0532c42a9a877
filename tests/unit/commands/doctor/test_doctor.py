"""The doctor: its diagnoses of given facts, its output, and the facts about this host."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.folders import composed_tree, write_run
from trainer.commands.doctor.checks import Diagnosis, diagnose
from trainer.commands.doctor.console import ranges, show
from trainer.commands.doctor.examine import HostSurvey, RunDirView, inspect_run_dir, marker_file
from trainer.commands.probe.host_facts import HostFacts, collect_host_facts
from trainer.commands.probe.link_bandwidth import Link
from trainer.commands.probe.network import PingResult, gloo_interface, list_interfaces, ping_all, serve_pings
from trainer.config.schema import read_config
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.launch.reachability import connection_error, is_local_host

VERSIONS = {"python": "3.12.1", "torch": "2.12.0", "NCCL": "2.27.3", "hydra": "1.3.2", "silotrain": "0.1.0"}


def world(nodes: int, ranks_each: int = 1, **changes: Any) -> HostSurvey:
    """Return the survey of nodes without a problem; `changes` are those of the facts of the last rank."""
    facts = [
        HostFacts(
            rank=node * ranks_each + local,
            node=node,
            host=f"n{node:02}",
            interface="eth0",
            address=f"10.0.0.{node + 1}",
            port=0 if local else 40000,
            proposed="eth0",
            versions=VERSIONS,
            threads=4,
            cores=list(range(4 * ranks_each)),
            omp="",
            memory=64.0,
            shm=8.0,
            disk=500.0,
            gpu=f"H100 GPU-{node}-{local}",
            gpu_memory=79.0,
            has_cuda=True,
            has_nvidia=True,
        )
        for node in range(nodes)
        for local in range(ranks_each)
    ]
    facts[-1] = replace(facts[-1], **changes)
    pings = {node: [PingResult(other, "", 0.0) for other in range(nodes) if other != node] for node in range(nodes)}
    return HostSurvey(facts, pings, {node: RunDirView(True, "") for node in range(nodes)}, [])


def diagnoses_of(survey: HostSurvey, *overrides: str) -> list[Diagnosis]:
    tree = dict(composed_tree(("run_dir=nowhere/run", *overrides)))
    return diagnose(survey, read_config(tree), tree)


def test_hosts_without_a_problem_have_no_diagnosis() -> None:
    assert diagnoses_of(world(nodes=4, ranks_each=8)) == []


@pytest.mark.parametrize(
    ("changes", "is_error", "text", "remedy"),
    [
        ({"versions": VERSIONS | {"torch": "2.11.0"}}, True, "2.12.0 on n00; 2.11.0 on n01", "install one"),
        ({"versions": VERSIONS | {"python": "3.11.9"}}, False, "python is not the same", "install one"),
        (
            {"threads": 16},
            False,
            "n01: 1 ranks with launch.threads_per_worker=16 share 4 cores",
            "launch.threads_per_worker=4",
        ),
        ({"omp": "16"}, False, "OMP_NUM_THREADS=16 is ignored", "launch.threads_per_worker=16"),
        ({"disk": 0.25}, True, "n01: only 0.25 GiB of disk are free for run_dir=nowhere/run", "run_dir"),
        ({"memory": 0.1}, True, "n01: only 0.10 GiB of memory", "fewer ranks"),
        ({"shm": 0.01}, True, "n01: only 0.01 GiB are free in /dev/shm", "--shm-size"),
        (
            {"has_cuda": False, "gpu": ""},
            False,
            "n01 has an NVIDIA device that torch 2.12.0 cannot use",
            "launch.device=cpu",
        ),
    ],
)
def test_a_problem_of_one_host_has_a_diagnosis_with_its_remedy(
    changes: dict[str, Any], is_error: bool, text: str, remedy: str
) -> None:
    (diagnosis,) = diagnoses_of(world(nodes=2, **changes))
    assert diagnosis.is_error == is_error
    assert text in diagnosis.text and remedy in diagnosis.remedy


def test_no_cuda_is_an_error_only_where_it_is_required() -> None:
    survey = world(nodes=1, has_cuda=False, gpu="")
    assert diagnoses_of(survey, "launch.device=cuda")[0].is_error
    assert diagnoses_of(survey, "launch.device=cpu") == []


def test_two_ranks_on_one_gpu_are_named() -> None:
    survey = world(nodes=1, ranks_each=3, gpu="H100 GPU-0-1")
    (diagnosis,) = diagnoses_of(survey)
    assert diagnosis.is_error and diagnosis.text.startswith("ranks 1, 2 are on one GPU of n00")


def test_a_clock_that_is_off_has_a_note() -> None:
    survey = world(nodes=3)
    survey.pings[0] = [PingResult(1, "", 0.5), PingResult(2, "", -3.25)]
    (diagnosis,) = diagnoses_of(survey)
    assert not diagnosis.is_error and "the clock of n02 is -3.2 s off that of n00" in diagnosis.text


def test_a_host_whose_name_resolves_to_its_loopback_is_given_the_interface() -> None:
    """The hosts that fail to reach it are not listed, since there is one cause."""
    survey = world(nodes=3, address="127.0.1.1", interface="lo", proposed="ib0")
    for node in (0, 1):
        survey.pings[node][-1] = PingResult(2, "Connection refused", 0.0)
    (diagnosis,) = diagnoses_of(survey)
    assert diagnosis.is_error and "127.0.1.1 on n02" in diagnosis.text
    assert "set GLOO_SOCKET_IFNAME=ib0" in diagnosis.remedy


def test_a_port_that_cannot_be_reached_is_named_with_both_ends() -> None:
    survey = world(nodes=2, ranks_each=2)
    survey.pings[1] = [PingResult(0, "timed out", 0.0)]
    (diagnosis,) = diagnoses_of(survey)
    assert diagnosis.is_error
    assert "n01 (rank 2) cannot reach n00 (rank 0) at 10.0.0.1, interface eth0, port 40000: timed out" in diagnosis.text


def test_a_folder_that_is_not_shared_is_an_error_where_it_must_be() -> None:
    survey = world(nodes=2)
    survey.views[1] = RunDirView(False, "")
    (diagnosis,) = diagnoses_of(survey)
    assert not diagnosis.is_error and "is not the same folder on n01 as on n00" in diagnosis.text
    (diagnosis,) = diagnoses_of(survey, "require_shared_run_dir=true")
    assert diagnosis.is_error and "require_shared_run_dir=false" in diagnosis.remedy


def test_a_run_that_does_not_fit_its_folder_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status="crashed", test_accuracy=[0.5])
    (diagnosis,) = diagnoses_of(world(nodes=1), f"run_dir={run}", "optimizer.lr=0.5")
    assert diagnosis.is_error and "optimizer.lr=0.5, but the run in this folder has 0.1" in diagnosis.text


def test_errors_come_first() -> None:
    diagnoses = diagnoses_of(world(nodes=2, omp="16", disk=0.1, threads=16, versions=VERSIONS | {"hydra": "1.4"}))
    assert [diagnosis.is_error for diagnosis in diagnoses] == [True, False, False]


def shown(survey: HostSurvey, diagnoses: list[Diagnosis]) -> list[str]:
    console = Console(file=StringIO(), width=160)
    show(survey, [], diagnoses, console)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


def test_five_hundred_ranks_are_one_row() -> None:
    survey = world(nodes=64, ranks_each=8)
    survey.links = [Link("inside silos", 64, 8, 2e-5, 3e11, slowest=9)]
    lines = shown(survey, [])
    assert len(lines) < 12 and max(map(len, lines)) <= 160
    row = next(line for line in lines if line.startswith("0-511"))
    assert "n00, n01, n02, n03, and 60 more" in row and "79.0 GiB" in row
    assert any("20 us" in line and "300 GB/s" in line and "rank 9, n01" in line for line in lines)


def test_a_rank_that_is_unlike_the_others_has_a_row_of_its_own() -> None:
    lines = shown(world(nodes=4, ranks_each=2, threads=1), [Diagnosis(True, "this is so", "do that")])
    rows = [line.split()[0] for line in lines if line.startswith(("0-6", "7 "))]
    assert rows == ["0-6", "7"]
    assert "wrong  this is so" in lines and "         do that" in lines


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 2, 3], "0, 2-3")])
def test_ranges(ranks: list[int], text: str) -> None:
    assert ranges(ranks) == text


def test_a_ping_is_answered_with_the_node_and_its_time() -> None:
    port = serve_pings("127.0.0.1", node=7)
    (result,) = ping_all({7: ("127.0.0.1", port)})
    assert result.error == "" and abs(result.clock_offset) < 0.1
    (result,) = ping_all({6: ("127.0.0.1", port)})
    assert result.error == "another node answers at this address"


def test_a_port_where_nothing_listens_is_reported_at_once() -> None:
    with socket.socket() as reserved:  # nobody else is given its port meanwhile
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        began = time.monotonic()
        (result,) = ping_all({1: ("127.0.0.1", port)})
        assert result.error == connection_error("127.0.0.1", port, 0.1) == "Connection refused"
        assert time.monotonic() - began < 2


def test_the_loopback_is_an_interface_of_this_host() -> None:
    assert ("lo", "127.0.0.1") in list_interfaces()
    assert is_local_host("127.0.0.1") and is_local_host("localhost") and not is_local_host("192.0.2.77")


def test_an_unknown_interface_is_refused_with_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME=eth77: .* has none\n  valid on that host: .*lo"):
        gloo_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo_interface() == ("lo", "127.0.0.1")


def test_the_facts_are_those_of_this_process(tmp_path: Path) -> None:
    config = read_config(composed_tree((f"run_dir={tmp_path}/a/b", "launch.threads_per_worker=3")))
    facts = collect_host_facts(config, ClusterEnvironment(), 0)
    assert facts.cores == sorted(os.sched_getaffinity(0)) and facts.threads == 3
    assert facts.host == socket.gethostname() and facts.disk > 0 and facts.memory > 0
    assert not (tmp_path / "a").exists()


def test_a_shared_folder_is_recognized_by_a_file_beside_it_and_nothing_is_left(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "deep/er/run", tmp_path / "other/run"
    with marker_file(run) as marker:
        assert inspect_run_dir(run, marker) == RunDirView(True, "")
        assert inspect_run_dir(elsewhere, marker) == RunDirView(False, "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with marker_file(tmp_path / "file/run") as marker:
        assert marker == ""
        assert "Not a directory" in inspect_run_dir(tmp_path / "file/run", marker).error
