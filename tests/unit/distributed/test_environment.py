"""The environment variables of torchrun, srun and a batch script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.distributed import environment
from trainer.distributed.environment import (
    ClusterEnvironment,
    check_launcher,
    check_ranks,
    check_world,
    detect_environment,
    is_main_process,
    is_worker,
)
from trainer.distributed.silos import silo_sizes

# As set by SLURM 22.05 in a batch script, in a step of `srun --ntasks=1`, and in task 3 of `srun --ntasks=4`.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
ONE_TASK = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
}
TASK = BATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "2",
}
A_NODE = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "5",
}


@pytest.mark.parametrize("env", [{}, BATCH, ONE_TASK, TASK | {"SLURM_STEP_ID": str(0xFFFFFFFB)}])
def test_a_shell_a_batch_script_and_a_single_task_make_no_world(env: dict[str, str]) -> None:
    assert detect_environment(env) == ClusterEnvironment()
    assert not is_worker([], env)


def test_torchrun_has_precedence_over_srun() -> None:
    expected = ClusterEnvironment(3, 4, 1, 2, 1, "host", 5, "torchrun")
    assert detect_environment(TORCHRUN) == detect_environment(TASK | TORCHRUN) == expected
    assert detect_environment(TORCHRUN | {"SILOTRAIN_LAUNCHER_PID": "7"}).launched_by == "launcher"


def test_the_tasks_of_srun_are_ranks() -> None:
    found = detect_environment(TASK)
    assert found == ClusterEnvironment(3, 4, 1, 2, 1, "node1", found.port, "srun", gpus=2)
    others = [TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, TASK | {"SLURM_GTIDS": "2,3"}]
    assert {detect_environment(env).port for env in others} == {found.port}, "all ranks derive the same"
    assert (
        detect_environment(TASK | {"SLURM_STEP_ID": "2"}).port
        != found.port
        != detect_environment(TASK | {"SLURM_JOB_ID": "8"}).port
    )
    assert found.port in environment.PORTS


def test_the_address_of_rank_0_can_be_set() -> None:
    found = detect_environment(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (found.host, found.port) == ("10.0.0.1", 29500)


def test_with_launch_nodes_the_tasks_are_launchers() -> None:
    assert is_worker(["rounds=3"], A_NODE)
    assert not is_worker(["rounds=3", "launch.nodes=2"], A_NODE)
    assert is_worker(["launch.nodes=2"], A_NODE | TORCHRUN), "a process of a launcher is a worker"


def compressed(counts: list[int]) -> str:
    """Return the numbers in SLURM's notation: 2(x3),1."""
    groups: list[list[int]] = []
    for count in counts:
        if groups and groups[-1][0] == count:
            groups[-1].append(count)
        else:
            groups.append([count])
    return ",".join(f"{group[0]}(x{len(group)})" if len(group) > 1 else f"{group[0]}" for group in groups)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=9), st.data())
def test_each_node_has_its_own_number_of_tasks(counts: list[int], data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(counts) - 1))
    facts = {"SLURM_STEP_NUM_TASKS": str(sum(counts)), "SLURM_STEP_TASKS_PER_NODE": compressed(counts)}
    found = detect_environment(TASK | facts | {"SLURM_NODEID": str(node)})
    assert (found.local_world_size, found.world_size, found.node) == (counts[node], sum(counts), node)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login", "login"),
        ("login,node[1-2]", "login"),
        ("node[1-2]", "node1"),
        ("node[01-03,7],login", "node01"),
        ("node[7,9-11]", "node7"),
        ("rack[2-4,7]-n[01-16],login", "rack2-n01"),
        ("gpu-a1.site.org", "gpu-a1.site.org"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert detect_environment(TASK | {"SLURM_STEP_NODELIST": hosts}).host == first


# Refused environments


def error_of(check: object, *arguments: object) -> str:
    assert callable(check)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers check the message)
        check(*arguments)
    return str(error.value)


def test_several_torchruns_on_a_node_are_refused() -> None:
    text = error_of(check_world, TASK | TORCHRUN)
    assert "2 tasks a node" in text and "srun --ntasks-per-node=1 torchrun" in text


def test_torchruns_that_do_not_know_of_each_other_are_refused() -> None:
    text = error_of(check_world, A_NODE | TORCHRUN | {"GROUP_WORLD_SIZE": "1"})
    assert "knows of 1 node" in text and "on 2" in text and "--nnodes=2" in text and "launch.nodes=2" in text


def test_one_torchrun_per_node_is_accepted() -> None:
    for env in ({}, BATCH | TORCHRUN, ONE_TASK | TORCHRUN, A_NODE | TORCHRUN, TASK):
        check_world(env)
    check_world(TASK | TORCHRUN | {"SILOTRAIN_LAUNCHER_PID": "7", "GROUP_WORLD_SIZE": "1"})


def test_several_launchers_on_a_node_are_refused() -> None:
    assert "2 tasks a node" in error_of(check_launcher, 2, TASK)
    assert "launch.nodes=3, but srun has started 2 nodes" in error_of(check_launcher, 3, A_NODE)
    assert "launch.nodes=[3,4], but" in error_of(check_launcher, [3, 4], A_NODE)
    for nodes, env in ((1, {}), (3, BATCH), (1, ONE_TASK), (2, A_NODE), ([1, 4], A_NODE)):
        check_launcher(nodes, env)


def test_another_number_of_ranks_than_srun_has_started_is_refused() -> None:
    text = error_of(check_ranks, detect_environment(TASK), 3)
    assert "launch.nproc_per_node=3" in text and "2 ranks on this node" in text and "--ntasks-per-node=3" in text
    for found, nproc in (
        (detect_environment(TASK), 2),
        (detect_environment(TASK), "auto"),
        (detect_environment(TORCHRUN), 3),
        (ClusterEnvironment(), 3),
    ):
        check_ranks(found, nproc)


def test_ranks_that_alternate_between_nodes_are_no_silos_of_nodes() -> None:
    """An example is `srun --distribution=cyclic`."""
    assert silo_sizes("node", [0, 0, 1]) == (2, 1)
    assert "srun --distribution=block" in error_of(silo_sizes, "node", [0, 1, 0])


def test_one_process_of_all_reports_errors() -> None:
    """It is not rank 0, because independent torchruns have one each."""
    assert is_main_process({}) and is_main_process(BATCH) and is_main_process(A_NODE | {"SLURM_PROCID": "0"})
    assert not is_main_process(TASK) and not is_main_process(A_NODE | TORCHRUN)
    assert not is_main_process(A_NODE | TORCHRUN | {"SLURM_PROCID": "0"}), "its local rank 0 does"
