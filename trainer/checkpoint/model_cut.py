"""How a model was cut into parts when a checkpoint was written, and how its tensors are cut anew for other parts.

Each part of a checkpoint has the same tree, of its own regions of the tensors, and says which regions these are. A rank
that holds the same regions as before reads its own part. Any other reads from all parts what overlaps with its regions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.format import LazyTensor, SavedState
from trainer.models.boxes import Box, PlacedBox, copy_overlap, whole_box
from trainer.optim.state import PERMUTED, decode_permuted

CUT = "cut"  # the section that says what each part of a checkpoint holds

Tree = Mapping[str, Any]
# From the trees of all parts, and how each was cut, to the tree for the regions of this rank.
Recut = Callable[[Sequence[Tree], "Sequence[ModelCut]", "ModelCut"], Tree]


@dataclass(frozen=True)
class ModelCut:
    """The boxes of a model that a rank holds.

    Attributes:
        shared: the boxes of the parameters that silos share, as they lie in vectors of them.
        personal: likewise of the personal ones.
        aliases: the names of tied parameters by their other names.
    """

    shared: tuple[PlacedBox, ...]
    personal: tuple[PlacedBox, ...]
    aliases: Mapping[str, str]

    @property
    def boxes(self) -> dict[str, Box]:
        """The box of each trainable parameter, by all its names."""
        boxes = {placed.name: placed.box for placed in (*self.shared, *self.personal)}
        return boxes | {alias: boxes[name] for alias, name in self.aliases.items()}

    def to_json(self) -> str:
        """Return the cut as text."""
        rows = [
            [[placed.name, placed.start, placed.box.offset, placed.box.shape, placed.box.whole] for placed in layout]
            for layout in (self.shared, self.personal)
        ]
        return json.dumps([*rows, dict(self.aliases)])


def cut_from_json(text: str) -> ModelCut:
    """Return the cut of which this is the `to_json`."""
    shared, personal, aliases = json.loads(text)
    return ModelCut(_layout(shared), _layout(personal), aliases)


def saved_cuts(saved: SavedState) -> list[ModelCut]:
    """Return how the model was cut in each part of a checkpoint."""
    parts = range(saved.load(CUT)["parts"])
    return [cut_from_json(saved.load(CUT, part=part)["json"]) for part in parts]


def whole_tensors(saved: SavedState, section: str) -> dict[str, Tensor | LazyTensor]:
    """Return the tensors of a section with a leaf for each name, put together from their parts where they are read."""
    cuts = saved_cuts(saved)
    boxes = [cut.boxes for cut in cuts]
    trees = [saved.load(section, part=part, copy=False) for part in range(len(cuts))]

    def whole(name: str, first: Tensor) -> Tensor | LazyTensor:
        if name not in boxes[0] or boxes[0][name].is_whole:
            return first
        to = whole_box(boxes[0][name].whole)
        pieces, of_pieces = [tree[name] for tree in trees], [of_part[name] for of_part in boxes]
        return LazyTensor(first.dtype, torch.Size(to.shape), lambda: recut_tensor(pieces, of_pieces, to))

    return {name: whole(name, first) for name, first in trees[0].items()}


def first_part(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Return the tree of the first part: all parts have the same."""
    return trees[0]


def recut_named(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut a mapping of names to tensors; tensors that are no parameters are equal in all parts."""
    boxes, saved = own.boxes, [cut.boxes for cut in cuts]
    return {
        name: recut_tensor([tree[name] for tree in trees], [of_part[name] for of_part in saved], boxes[name])
        if name in boxes
        else leaf
        for name, leaf in trees[0].items()
    }


def recut_vectors(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut a tree whose vectors are all of shared parameters, from the first to the last."""
    return _recut_vectors(trees, [cut.shared for cut in cuts], own.shared)


def recut_personal(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut) -> Tree:
    """Cut a tree of `FlatModel.personal_state`s: the vectors named `parameters` are of personal parameters."""
    if not isinstance(trees[0], Mapping):
        return trees[0]
    if "parameters" in trees[0]:
        vectors = [tree["parameters"] for tree in trees]
        return {**trees[0], "parameters": recut_vector(vectors, [cut.personal for cut in cuts], own.personal)}
    return {name: recut_personal([tree[name] for tree in trees], cuts, own) for name in trees[0]}


def recut_by_place(trees: Sequence[Tree], cuts: Sequence[ModelCut], own: ModelCut, named: Sequence[str]) -> Tree:
    """Cut the state of an optimizer, whose tensors of a parameter's shape are cut as it is.

    Args:
        trees: by the place of each parameter, and then by name.
        cuts: of the trees.
        own: the cut that is wanted.
        named: the names of the trainable parameters, by place.
    """
    saved, boxes_now = [cut.boxes for cut in cuts], own.boxes

    def cut_leaf(leaves: Sequence[Any], name: str) -> Any:
        if isinstance(leaves[0], Mapping) and PERMUTED in leaves[0]:
            return cut_leaf([decode_permuted(leaf[PERMUTED]) for leaf in leaves], name)
        if isinstance(leaves[0], Mapping):
            return {key: cut_leaf([leaf[key] for leaf in leaves], name) for key in leaves[0]}
        boxes = [of_part[name] for of_part in saved]
        pairs = list(zip(leaves, boxes, strict=True))
        if all(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape == box.shape for leaf, box in pairs):
            return recut_tensor(leaves, boxes, boxes_now[name])
        return leaves[0]

    places = {str(place): name for place, name in enumerate(named)}
    return {
        key: cut_leaf([tree[key] for tree in trees], places[key]) if key in places else value
        for key, value in trees[0].items()
    }


def recut_tensor(pieces: Sequence[Tensor], boxes: Sequence[Box], to: Box) -> Tensor:
    """Return a box of a tensor, from the pieces of which it consists."""
    into = pieces[0].new_zeros(to.shape)
    for piece, box in zip(pieces, boxes, strict=True):
        copy_overlap(piece, box, into, to)
    return into


def recut_vector(vectors: Sequence[Tensor], layouts: Sequence[Sequence[PlacedBox]], to: Sequence[PlacedBox]) -> Tensor:
    """Return a vector of boxes that ends with the last of them, from those of all parts.

    Args:
        vectors: of the parts.
        layouts: of each.
        to: the boxes that are wanted.
    """
    into = vectors[0].new_zeros(max((placed.start + placed.box.numel for placed in to), default=0))
    by_name = [{placed.name: placed for placed in layout} for layout in layouts]
    for placed in to:
        # The first part is the last to be copied: it alone has all of what several parts hold.
        for vector, layout in zip(reversed(vectors), reversed(by_name), strict=True):
            source = layout[placed.name]
            if source.box.numel:
                copy_overlap(source.of(vector), source.box, placed.of(into), placed.box)
    return into


def _recut_vectors(values: Sequence[Any], layouts: Sequence[Sequence[PlacedBox]], to: Sequence[PlacedBox]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _recut_vectors([value[key] for value in values], layouts, to) for key in first}
    if isinstance(first, Tensor) and first.dim() == 1:
        return recut_vector(values, layouts, to)
    return first


def _layout(rows: Iterable[Sequence[Any]]) -> tuple[PlacedBox, ...]:
    return tuple(
        PlacedBox(name, start, Box(tuple(offset), tuple(shape), tuple(whole)))
        for name, start, offset, shape, whole in rows
    )
