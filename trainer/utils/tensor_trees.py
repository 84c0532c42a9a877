"""Trees of tensors: a tensor, or a tuple, list or dict of trees. A batch is one with B examples in every tensor.

A single tensor, the usual tree, is treated first: it costs nothing more than without this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage] (torch's own, as in DDP and FSDP)

Tree = Any  # a type checker cannot tell which of them a user's data has


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Return the same tree with the results of `function` in place of the tensors."""
    return function(tree) if isinstance(tree, Tensor) else pytree.tree_map(function, tree)


def tensors(tree: Tree) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    return [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)


def named_tensors(tree: Tree) -> dict[str, Tensor]:
    """Return the tensors by their dotted names, such as `text.0`; a single tensor has the empty name."""
    branches = _branches(tree)
    if not branches:
        return {"": tree}
    named = {name: named_tensors(branch) for name, branch in branches.items()}
    return {f"{name}.{below}".rstrip("."): leaf for name, leaves in named.items() for below, leaf in leaves.items()}


def first_tensor(tree: Tree) -> Tensor:
    """Return the first tensor of a tree."""
    return tree if isinstance(tree, Tensor) else pytree.tree_leaves(tree)[0]


def num_examples(batch: Tree) -> int:
    """Return B, the number of examples of a batch."""
    return len(first_tensor(batch))


def nbytes(tree: Tree) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors(tree))


def take(batch: Tree, rows: Any) -> Tree:
    """Return some examples of a batch, by an index or a slice of its rows."""
    return map_tensors(lambda tensor: tensor[rows], batch)


def split(batch: Tree, sizes: int | list[int]) -> Sequence[Tree]:
    """Split a batch into batches of these sizes, or of at most this size, as `Tensor.split` does."""
    if isinstance(batch, Tensor):
        return batch.split(sizes)
    leaves, structure = pytree.tree_flatten(batch)
    parts = zip(*(leaf.split(sizes) for leaf in leaves), strict=True)
    return [pytree.tree_unflatten(part, structure) for part in parts]


def concatenate(batches: Sequence[Tree]) -> Tree:
    """Return one batch of the examples of several that have the same structure."""
    return zip_tensors(torch.cat, batches)


def zip_tensors(function: Callable[[list[Tensor]], Any], trees: Sequence[Tree]) -> Tree:
    """Return a tree of the results of `function`, each of the tensors that are at the same place in all trees."""
    leaves, structure = zip(*map(pytree.tree_flatten, trees), strict=True)
    return pytree.tree_unflatten([function(list(column)) for column in zip(*leaves, strict=True)], structure[0])


def select(tree: Tree, name: str) -> Any:
    """Return the tensor or the branch of this dotted name.

    Raises:
        KeyError: there is none.
    """
    for part in name.split(".") if name else ():
        branches = _branches(tree)
        if part not in branches:
            raise KeyError(name)
        tree = branches[part]
    return tree


def with_tensor(tree: Tree, name: str, value: Tensor) -> Tree:
    """Return a copy of the tree with another tensor in place of the one of this dotted name."""
    leaves = named_tensors(tree) | {name: value}
    return pytree.tree_unflatten(leaves.values(), pytree.tree_structure(tree))


def describe(batch: Tree) -> str:
    """Describe an example of a batch: its shape, such as `[3, 32, 32]`, or those of its tensors by name."""
    named = named_tensors(batch)
    shapes = {name: str(list(tensor.shape[1:])) for name, tensor in named.items()}
    return shapes[""] if "" in shapes else ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def batch_error(batch: Tree) -> str:
    """Return why a tree is not a batch of tensors, all with the same number of rows; empty if it is."""
    named = named_tensors(batch)
    for name, leaf in named.items():
        if not isinstance(leaf, Tensor):
            return f"{name or 'it'} is a {type(leaf).__name__}, not a tensor"
        if not leaf.dim():
            return f"{name or 'it'} is a single number, without a dimension for the examples"
    sizes = {name: len(leaf) for name, leaf in named.items()}
    if len(set(sizes.values())) > 1:
        return f"its tensors have different numbers of rows: {', '.join(f'{name} {n}' for name, n in sizes.items())}"
    return ""


def _branches(tree: Tree) -> Mapping[str, Tree]:
    """Return what is directly below, by the parts of dotted names."""
    if isinstance(tree, Mapping):
        return {str(key): branch for key, branch in tree.items()}
    if hasattr(tree, "_fields"):
        return dict(zip(tree._fields, tree, strict=True))
    return {str(index): branch for index, branch in enumerate(tree)} if isinstance(tree, list | tuple) else {}
