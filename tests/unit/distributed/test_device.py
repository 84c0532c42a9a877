"""The device of a rank, on nodes with any number of GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.pool import RankPool
from tests.support.runs import fedavg, make_run, parameters
from trainer.distributed.device import check_nccl, choose_device, count_ranks_on_device
from trainer.distributed.environment import ClusterEnvironment
from trainer.distributed.topology import _inter_silo_backend, distributed
from trainer.loop.fit import fit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def with_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this number of GPUs is visible."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


def environment_of(local_rank: int, ranks: int, gpus: int | None = None) -> ClusterEnvironment:
    return ClusterEnvironment(rank=local_rank, local_rank=local_rank, local_world_size=ranks, gpus=gpus)


@given(st.integers(1, 5), st.integers(1, 9))
def test_ranks_take_the_gpus_in_turns(gpus: int, ranks: int) -> None:
    """The ranks are spread evenly, and each knows the number of ranks on its GPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_gpus(gpus, monkeypatch)
        environments = [environment_of(rank, ranks) for rank in range(ranks)]
        chosen = [choose_device("auto", environment, "gloo") for environment in environments]
        shared = Counter(device.index for device in chosen)
        assert [device.index for device in chosen] == [rank % gpus for rank in range(ranks)]
        assert [count_ranks_on_device(*pair) for pair in zip(chosen, environments, strict=True)] == [
            shared[d.index] for d in chosen
        ]


@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_nccl_needs_a_gpu_for_each_rank(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(2, monkeypatch)
    assert choose_device("cuda", environment_of(1, 2), backend).index == 1
    with pytest.raises(
        ValueError, match=r"but 2 are visible.*\n.*launch\.nproc_per_node=2, or launch\.backend=gloo.*device=cpu"
    ):
        choose_device("cuda", environment_of(0, 3), backend)


def test_without_a_gpu_there_is_none_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(0, monkeypatch)
    assert choose_device("auto", environment_of(0, 3), "gloo") == CPU
    with pytest.raises(ValueError, match=r"but 0 are visible.*\n  set launch\.device=cpu"):
        choose_device("cuda", environment_of(0, 3), "gloo")


def test_srun_shows_each_task_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(1, monkeypatch)
    environment = environment_of(3, 4, gpus=4)
    assert choose_device("auto", environment) == GPU and count_ranks_on_device(GPU, environment) == 1


def test_ranks_on_the_cpu_share_nothing() -> None:
    assert count_ranks_on_device(CPU, environment_of(1, 4)) == 1


def test_nccl_without_gpus_is_refused() -> None:
    check_nccl("launch.backend", "nccl", GPU)
    with (
        pytest.raises(ValueError, match=r"launch\.backend=nccl, but the ranks are on the CPU"),
        distributed(device="cpu", backend="nccl"),
    ):
        pass
    with pytest.raises(ValueError, match=r"launch\.inter_silo_backend=nccl with launch\.backend=gloo"):
        _inter_silo_backend("nccl", "gloo", GPU)
    assert [_inter_silo_backend(choice, "gloo", GPU) for choice in ("auto", "gloo")] == [None, "gloo"]


def trained(device: str) -> list[Tensor]:
    """Return the parameters after two rounds of two silos."""
    with distributed(2, device=device) as topology:
        run = make_run(topology, [40, 30], algorithm=fedavg(), rounds=2)
        return [parameter.cpu() for parameter in parameters(fit(run).model)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_silos_on_one_gpu_train_what_two_on_the_cpu_do(ranks: Callable[[int], RankPool]) -> None:
    (first, second), (expected, _) = (ranks(2).run(trained, device) for device in ("cuda", "cpu"))
    assert all(map(torch.equal, first, second))
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
