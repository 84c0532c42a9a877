"""Sections of a checkpoint, cut anew for ranks that hold other parts of the model than those that saved it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from trainer.algorithms.server_optimizer import LENGTH, extract_range, sorted_by_offset
from trainer.checkpoint.format import SavedState
from trainer.checkpoint.model_cut import (
    ModelCut,
    Recut,
    Tree,
    first_part,
    recut_by_place,
    recut_named,
    recut_personal,
    recut_vectors,
    saved_cuts,
)
from trainer.models.flat import FlatModel
from trainer.optim.state import OptimizerState, clone


def model_cut(model: FlatModel) -> ModelCut:
    """Return what this rank holds of a model."""
    return ModelCut(model.shared_layout, model.personal_layout, model.names)


class SavedParts:
    """A checkpoint, as a rank reads it that holds a part of the model.

    Args:
        saved: the checkpoint.
        model: of this rank.
        part: of the model, which this rank holds.
        optimizer: of the clients, whose state is saved by the places of parameters.

    Attributes:
        is_own_cut: whether the part was saved as this rank holds it; else it is put together from all parts.
    """

    def __init__(self, saved: SavedState, model: FlatModel, part: int, optimizer: OptimizerState):
        self.saved, self.own, self.part = saved, model_cut(model), part
        self.cuts = saved_cuts(saved)
        self.is_own_cut = part < len(self.cuts) and self.cuts[part] == self.own
        names = {id(parameter): name for name, parameter in model.named_trainable}
        by_place = partial(recut_by_place, named=[names[id(parameter)] for parameter in optimizer.parameters])
        self._recut: dict[str, Recut] = {
            "model": recut_named,
            "ema": recut_named,
            "fresh": recut_personal,
            "clients": partial(_recut_clients, by_place=by_place),
            "inner": partial(_recut_inner, by_place=by_place),
            "residuals": _recut_residuals,
            "algorithm": _recut_algorithm,
            "round": _recut_round,
        }

    def load(self, section: str, is_wanted: Callable[[str], bool] = bool) -> dict[str, Any]:
        """Return the tree of a section for this rank; see `SavedState.load`."""
        if self.is_own_cut:
            return self.saved.load(section, is_wanted, self.part)
        trees = [self.saved.load(section, is_wanted, part, copy=False) for part in range(len(self.cuts))]
        return clone(dict(self._recut.get(section, first_part)(trees, self.cuts, self.own)))


def _recut_clients(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut, by_place: Recut) -> Tree:
    """Cut the states of clients, by client."""
    rules: dict[str, Recut] = {"personal": recut_personal, "algorithm": recut_vectors, "optimizer": by_place}
    return {
        client: {name: rules.get(name, first_part)([tree[client][name] for tree in trees], cuts, own) for name in state}
        for client, state in trees[0].items()
    }


def _recut_inner(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut, by_place: Recut) -> Tree:
    """Cut the state of the client in training: of its optimizer alone."""
    return {**trees[0], **_under("optimizer", by_place, trees, cuts, own)}


def _recut_algorithm(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut vectors of an algorithm, and those of which each rank has a shard."""
    blocks = ("server", "totals")
    recut = dict(recut_vectors([_without(tree, *blocks) for tree in trees], cuts, own))
    for name in blocks:
        recut |= _under(name, _recut_blocks, trees, cuts, own)
    return recut


def _recut_round(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut the vectors of the middle of a round, of which a sum may be of a fragment."""
    numbers = json.loads(trees[0]["json"]) if "json" in trees[0] else {}
    if "sum" not in trees[0] or "due" not in numbers:
        return recut_vectors(trees, cuts, own)
    sums = [{str(numbers["due"]): {"sum": tree["sum"]}} for tree in trees]
    whole = _recut_blocks(sums, cuts, own)["0"]["sum"]
    rest = recut_vectors([_without(tree, "sum") for tree in trees], cuts, own)
    return {**rest, "sum": whole, "json": json.dumps({**numbers, "due": 0})}


def _recut_residuals(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut what compression has held back, by silo, vector and kind. Factors of matrices begin at random."""

    def cut_pieces(silos: Sequence[Tree]) -> Tree:
        if "residuals" in silos[0]:
            return {"residuals": cut_pieces([silo["residuals"] for silo in silos]), "rows": {}}
        return {
            name: {
                kind: {"0": _recut_blocks([_as_entries(silo[name][kind]) for silo in silos], cuts, own)["0"]["piece"]}
                for kind in kinds
            }
            for name, kinds in silos[0].items()
        }

    return {silo: cut_pieces([tree[silo] for tree in trees]) for silo in trees[0]}


def _as_entries(pieces: Mapping[str, Tensor]) -> Tree:
    return {start: {"piece": piece} for start, piece in pieces.items()}


def _recut_blocks(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut the states of blocks, by their offsets in a vector, into one of the whole vector."""
    if not trees[0]:
        return {}
    ends = [max(placed.start + placed.box.numel for placed in cut.shared) for cut in cuts]
    wholes = [extract_range(sorted_by_offset(tree), slice(0, end)) for tree, end in zip(trees, ends, strict=True)]
    length = max(placed.start + placed.box.numel for placed in own.shared)
    return {"0": {**recut_vectors(wholes, cuts, own), LENGTH: length}}


def _under(name: str, rule: Recut, trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Return the subtree of a name, cut by a rule; nothing if there is none."""
    return {name: rule([tree[name] for tree in trees], cuts, own)} if name in trees[0] else {}


def _without(tree: Tree, *names: str) -> Tree:
    return {name: value for name, value in tree.items() if name not in names}
