"""Parameters that some batches do not use: with allow_unused replicas are one rank, without it they are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.laws.cases import assert_close, leaves
from tests.support.runs import make_run
from tests.support.unusual import EXAMPLES, Sometimes, table
from trainer.data import Clients
from trainer.distributed.topology import Topology, distributed
from trainer.loop.fit import fit
from trainer.loop.run import Run
from trainer.utils.errors import InputError


def run_of(topology: Topology, allow_unused: bool) -> Run:
    """Return a run of three steps, of which the second one does not use the spare layer."""
    clients = Clients((np.arange(EXAMPLES),), (np.arange(0),), (np.arange(8),))
    torch.manual_seed(0)
    choices: dict[str, Any] = {"module": Sometimes("batch").double(), "data": table("float64"), "clients": clients}
    return make_run(topology, [EXAMPLES], **choices, allow_unused=allow_unused)


def parameters_of_replicas() -> dict[str, Any]:
    with distributed() as topology:
        return leaves(fit(run_of(topology, allow_unused=True)).model.state_dict())


def error_of_replicas() -> str:
    with distributed() as topology:
        try:
            fit(run_of(topology, allow_unused=False))
        except InputError as error:
            return str(error)
    return ""


def test_replicas_are_one_rank(ranks) -> None:
    (alone,) = ranks(1).run(parameters_of_replicas)
    for ours in ranks(2).run(parameters_of_replicas):
        assert_close(ours, alone, 1e-12)


def test_the_parameters_and_the_key_are_named(ranks) -> None:
    """Torch names indices, and an argument of DDP."""
    for error in ranks(2).run(error_of_replicas):
        assert "model=Sometimes: the loss of a batch does not depend on spare.weight, spare.bias" in error
        assert "set allow_unused=true" in error and "find_unused_parameters" not in error
