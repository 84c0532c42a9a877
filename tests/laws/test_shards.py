"""A silo that holds its model in parts trains as one whose ranks each hold all of it.

Two parts in a silo of two ranks are the DDP run to the last bit, unless something of the whole model is summed, such as
a norm that limits an update. With more ranks, sums are added in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.cases import CASES, SIZES, Records, assert_close, case_run, figures, leaves, silos_of, tiny_data
from tests.laws.test_adapters import SIZES as ADAPTED_SIZES
from tests.laws.test_adapters import TEST as ADAPTED_TEST
from tests.laws.test_adapters import adapted, masked_data
from tests.laws.test_sites import FEATURES, FLOATS, SMALL
from tests.support.runs import make_clients, make_data
from trainer.data import DataSplits
from trainer.distributed.gradients import HalfPrecisionReducer
from trainer.distributed.silos import SiloSpec
from trainer.distributed.topology import distributed
from trainer.loggers import Metrics
from trainer.loop.fit import fit
from trainer.loop.options import ClipOptions
from trainer.loop.run import Run
from trainer.loop.train_state import TrainState
from trainer.models import GPT
from trainer.models.boxes import Box
from trainer.optim import GroupedOptimizerFactory
from trainer.tasks import LanguageModelling

Region = tuple[Box, Tensor]


@dataclass(frozen=True)
class Held:
    """The result of a run on one rank.

    Attributes:
        part: the index of this rank's part of the model.
        regions: what it holds of each tensor, by path.
        others: what is not divided, by path.
        rounds: the metrics of the rounds, and those of the run.
    """

    part: int
    regions: dict[str, Region]
    others: dict[str, Any]
    rounds: list[Metrics]


def train_part(name: str, choices: Mapping[str, Any], silos: SiloSpec, shard: int) -> Held:
    """Train a row of the table of algorithms, and return what this rank holds at the end."""
    with distributed(silos_of(name, silos), device="cpu", shard=shard) as topology:
        return held(case_run(topology, name, choices))


def held(run: Run) -> Held:
    """Train a run, and return what this rank holds at the end."""
    states: list[TrainState] = []
    records = Records()
    result = fit(run, [records], on_start=states.append)
    (state,) = states
    model, regions = state.model, dict[str, Region]()
    names = {id(parameter): name for name, parameter in model.named_trainable}

    def take(path: str, tensors: Mapping[str, Tensor]) -> None:
        regions.update({f"{path}/{n}": (model.boxes[n], t.detach().clone()) for n, t in tensors.items()})

    def take_vectors(path: str, tree: Mapping[str, Any]) -> None:
        for name, vector in tree.items():
            if isinstance(vector, Tensor) and len(vector) == len(model.shared):
                take(f"{path}/{name}", dict(zip(model.shared_names, model.views(vector), strict=True)))

    take_vectors("model", {"shared": model.shared})
    take_vectors("algorithm", state.algorithm.global_state() | state.algorithm.state_dict())
    take_vectors("server", server_vectors(state))
    if state.ema:
        take_vectors("ema", {"average": state.ema.vector})
    others: dict[str, Any] = {"buffers": dict(model.module.named_buffers())}
    for client, kept in state.trainer.clients.states.items():
        path, optimizer = f"client {client}", kept.get("optimizer", {})
        take_vectors(path, kept["algorithm"])
        for place, parameter in enumerate(state.trainer.step.optimizer_state.parameters):
            for key, value in optimizer.get(str(place), {}).items():
                if isinstance(value, Tensor) and value.dim():
                    take(f"{path}/optimizer/{key}", {names[id(parameter)]: value})
        state.trainer.load_personal(client)
        take(f"{path}/personal", {name: p for name, p in model.named_trainable if name in model.personal_names})
        others[path] = {name: buffer.clone() for name, buffer in model.personal_buffers.items()}
    reported = {name: value for name, value in result.metrics.items() if not isinstance(value, str)}
    return Held(run.topology.part, regions, leaves(others), [*records.rounds, reported])


def server_vectors(state: TrainState) -> dict[str, Tensor]:
    """Return the vectors of the server optimizer's state, of which this rank has its shard, and zeros elsewhere."""
    vectors: dict[str, Tensor] = {}
    for start, block in state.algorithm.sharded_state_dict().get("server", {}).items():
        for name, values in leaves(block).items():
            if isinstance(values, Tensor) and values.dim():
                whole = vectors.setdefault(name, torch.zeros_like(state.model.shared, dtype=values.dtype))
                whole[int(start) : int(start) + len(values)] = values
    return vectors


def assembled(silo: Sequence[Held]) -> dict[str, Tensor]:
    """Put the parts of a silo together. Of the server's state each copy has its shard."""
    whole: dict[str, Tensor] = {}
    for rank in silo:
        for path, (box, values) in rank.regions.items():
            region = whole.setdefault(path, torch.zeros(box.whole, dtype=values.dtype))[box.slices]
            region.copy_(region + values if path.startswith("server/") else values)
    return whole


def assert_same_run(
    ours: Sequence[Held], theirs: Sequence[Held], silos: int = 2, tolerance: float = 0.0, figures_tolerance: float = 0.0
) -> None:
    """Assert that two runs have the same models, states and figures.

    Args:
        ours: the ranks of the run in parts.
        theirs: those of the run without.
        silos: into which both are divided.
        tolerance: of tensors; 0: they are equal to the last bit.
        figures_tolerance: of figures, in which there are norms, whose sums are added in another order.
    """
    size = len(ours) // silos
    for first in range(0, len(ours), size):
        parts, copies = ours[first : first + size], theirs[first : first + size]
        assert_parts_are_equal(parts, ("model/", "client "))
        one, other = assembled(parts), assembled(copies)
        assert one.keys() == other.keys()
        if tolerance:
            assert_close(one, other, tolerance)
        else:
            assert not [path for path, tensor in one.items() if not torch.equal(tensor, other[path])]
    assert_parts_are_equal(ours, ("algorithm/", "ema/"))
    close = max(1e-12, tolerance)
    for rank, other in zip(ours, theirs, strict=True):
        assert_close(rank.others, other.others, close)
        for metrics, expected in zip(rank.rounds, other.rounds, strict=True):
            limit = max(1e-9, tolerance, figures_tolerance)
            assert figures(metrics) == pytest.approx(figures(expected), rel=limit, abs=limit, nan_ok=True)


def assert_parts_are_equal(ranks: Sequence[Held], paths: tuple[str, ...]) -> None:
    """Assert that ranks with the same part hold the same bits of it, at paths that begin so."""
    for rank in ranks:
        first = next(other for other in ranks if other.part == rank.part)
        for path in filter(lambda path: path.startswith(paths), rank.regions):
            (box, values), (other_box, other_values) = rank.regions[path], first.regions[path]
            assert box == other_box
            assert torch.equal(values, other_values), path


def compare(
    ranks: Any, name: str, choices: Mapping[str, Any], size: int, silos: int, shard: int, **limits: Any
) -> None:
    """Assert that a run in parts is the run without."""
    runs = [ranks(size).run(train_part, name, choices, silos, parts) for parts in (shard, 1)]
    assert_same_run(*runs, silos=silos, **limits)


LOSSY = [name for name, case in CASES.items() if "update_compression" in case.choices]
# Sums of the whole model are in what is trained: the norm by which an update is scaled.
ROUNDED = {"bounded": {"tolerance": 1e-12}}


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOSSY])
@pytest.mark.quick_rows(3)
def test_two_parts_are_two_copies(ranks, name: str):
    silos = 1 if name == "sync" else 2
    compare(ranks, name, {"rounds": 3}, 2 * silos, silos, 2, **ROUNDED.get(name, {}))


REFUSED = {"float16"}  # each rank would have to know of the others' overflows
LIMITS: dict[str, dict[str, float]] = {
    "a frozen layer": {"figures_tolerance": 1e-5},  # in float32
    "bfloat16": {"figures_tolerance": 1e-5},
    "a model in bfloat16": {"figures_tolerance": 1e-2},
    "an average of models in bfloat16": {"figures_tolerance": 1e-2},
    "clipping": {"tolerance": 1e-12},
}


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature not in REFUSED])
@pytest.mark.quick_rows(2)
def test_two_parts_are_two_copies_with(ranks, feature: str):
    name, choices = FEATURES[feature]
    compare(ranks, name, SMALL | choices, 4, 2, 2, **LIMITS.get(feature, {}))


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOSSY])
@pytest.mark.parametrize("shard", [2, 4])
@pytest.mark.quick_rows(1)
def test_four_ranks_of_a_silo(ranks, name: str, shard: int):
    """Two copies of two parts, and four parts, of which some have no row of a layer with three."""
    compare(ranks, name, {"rounds": 2}, 4, 1, shard, tolerance=1e-11)


@pytest.mark.parametrize("name", ["int8", "topk"])
@pytest.mark.quick_rows(1)
def test_what_is_lost_between_silos_is_lost_alike(ranks, name: str):
    """Of a matrix of 16 rows each of two copies sends the eight that are a part: the same bits.

    int4 and PowerSGD draw random numbers, each part others: test_parts.py has laws of what they send.
    """
    data = tiny_data(sum(SIZES))
    wide = {"module": nn.Linear(6, 16, bias=False).double(), "data": DataSplits(data.train, data.test, 16)}
    compare(ranks, name, {"rounds": 3} | wide, 4, 2, 2)


@pytest.mark.long
def test_blocks_of_int8_are_cut_elsewhere(ranks):
    compare(ranks, "int8", {"rounds": 3}, 4, 2, 2, tolerance=1e-3)


def gpt_choices(clip: ClipOptions, **choices: Any) -> dict[str, Any]:
    """Return the choices of a small GPT with 65 tokens, tied ends, and groups of parameters."""
    data = make_data("gpt", 24)
    adamw = GroupedOptimizerFactory(partial(torch.optim.AdamW, lr=0.01), True, (("blocks", 0.5),))
    return choices | {
        "module": GPT(vocabulary=65, length=16, layers=2, heads=2, width=32).double(),
        "task": LanguageModelling(),
        "data": data,
        "clients": make_clients([9, 8, 7]),
        "sizes": [9, 8, 7],
        "optimizer": adamw,
        "clip": clip,
        "rounds": 2,
    }


CLIPS = {
    "unclipped": (ClipOptions(), {}),
    "values": (ClipOptions(max_value=1e-3), {}),
    "norm": (ClipOptions(max_norm=0.1), {"tolerance": 1e-12}),
    "norm of order 1": (ClipOptions(max_norm=0.1, norm_type=1), {"tolerance": 1e-12}),
    "largest number": (ClipOptions(max_norm=1e-3, norm_type=float("inf")), {}),
    "norm of values": (ClipOptions(max_norm=0.1, max_value=1e-2), {"tolerance": 1e-12}),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.quick_rows(1)
def test_a_transformer_in_parts(ranks, clip: str):
    """A vocabulary that two does not divide, decay and rates by name, and norms of the whole gradient."""
    options, limits = CLIPS[clip]
    compare(ranks, "diloco", gpt_choices(options), 4, 2, 2, **limits)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "fused adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.quick_rows(1)
def test_one_silo_in_float32(ranks, optimizer: str):
    """Five epochs. A fused step rounds the last numbers of a tensor in another way, which are others of a part."""
    choices = FLOATS | {"sizes": SIZES[:5], "optimizer": OPTIMIZERS[optimizer], "rounds": 5, "ema_decay": 0.9}
    limits = {"tolerance": 1e-5} if optimizer == "fused adamw" else {"figures_tolerance": 1e-5}
    compare(ranks, "sync", choices, 2, 1, 2, **limits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.quick_rows(1)
def test_gradients_travel_in_16_bits(ranks, dtype: Any):
    """As in DDP, and other bits than in 32."""
    choices = FLOATS | {"sizes": SIZES[:5], "rounds": 2}
    compressed = choices | {"gradient_compression": partial(HalfPrecisionReducer, dtype)}
    compare(ranks, "sync", compressed, 2, 1, 2, figures_tolerance=1e-5)
    one, other = (assembled(ranks(2).run(train_part, "sync", each, 1, 2)) for each in (choices, compressed))
    assert not torch.equal(one["model/shared/0.weight"], other["model/shared/0.weight"])


def test_adapters_in_parts(ranks):
    """LoRA beside a base that is frozen, and divided too."""
    choices = {
        "module": adapted(),
        "task": LanguageModelling(),
        "data": masked_data(),
        "clients": make_clients(ADAPTED_SIZES, ADAPTED_TEST),
        "sizes": ADAPTED_SIZES,
        "optimizer": partial(torch.optim.SGD, lr=1.0),
        "rounds": 2,
    }
    compare(ranks, "fedavg", choices, 4, 2, 2, figures_tolerance=1e-5)
