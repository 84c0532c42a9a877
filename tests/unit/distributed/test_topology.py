"""The position of a rank in its world."""

from __future__ import annotations

import os

import pytest

from trainer.distributed.topology import distributed


@pytest.mark.parametrize("chosen", [None, "eth77"])
def test_the_interfaces_of_one_machine_are_chosen_for_the_block_alone(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is started afterwards, such as the next run of a notebook, finds the user's own choice."""
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    if chosen:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    else:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with distributed(device="cpu"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen and "NCCL_SOCKET_IFNAME" not in os.environ
