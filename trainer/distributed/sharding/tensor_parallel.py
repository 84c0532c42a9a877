"""Tensor parallelism: the layers of a model divided over ranks, by the plan that the model itself has.

A plan, `module.tp_plan`, maps names of layers, with `*` for any, to styles. It has the words of the package
transformers, whose models have plans of their own; a style of `torch.distributed.tensor.parallel` may take the place of
a word. Layers that it does not name are whole on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from trainer.utils.errors import InputError
from trainer.utils.text import first_few


class HeadsParallel(ParallelStyle):
    """A layer that is whole, and gets the heads [B, T, heads, n] of this rank alone: a norm of queries or keys.

    So each rank has a part of the gradient of its weight, which is summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._replicate, self._enter, self._leave)

    @staticmethod
    def _replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            whole = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
            module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))

    @staticmethod
    def _enter(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:  # torch says None
        heads = Shard(inputs[0].dim() - 2)
        return (DTensor.from_local(inputs[0], mesh, [heads], run_check=False),)

    @staticmethod
    def _leave(module: nn.Module, outputs: DTensor, mesh: DeviceMesh) -> Any:
        return outputs.to_local()


# The cut of the weight, and how what the layer makes of it is brought together.
STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": HeadsParallel,
}
CUTTING = ("colwise", "rowwise", "colwise_gather_output", "embedding_rowwise")
OF_VOCABULARY = ("colwise_gather_output", "embedding_rowwise")  # need not be cut for the layers next to them

# Attributes of a model or of its `config`: attention gives each rank whole heads.
HEADS = {"heads": "model.heads"}
CONFIG_HEADS = ("num_attention_heads", "num_key_value_heads")

MAX_NAMED = 5  # layers in an error

Plan = dict[str, str | ParallelStyle]


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the layers of a module over the ranks of a mesh, by its plan. No collective: all ranks have equal modules.

    Args:
        module: its parameters become DTensors where they are cut; tied ones stay tied.
        mesh: of one axis.

    Raises:
        InputError: the model has no plan, or cannot be divided over these ranks.
    """
    # Earlier groups of the same ranks may be closed, and DTensor remembers operations by the ranks of a mesh alone.
    _clear_sharding_prop_cache()
    # Of the logits, which are gathered. Nothing writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    ranks = mesh.size()
    plan = plan_of(module, ranks)
    tied = _tied_parameters(module)
    # With a rank as the source torch would send every parameter by itself, whole, to ranks that have it.
    parallelize_module(module, mesh, {name: _make(style) for name, style in plan.items()}, src_data_rank=None)
    _check_cuts(module, ranks)
    _tie_again(module, tied)


def plan_of(module: nn.Module, ranks: int) -> Plan:
    """Return the style of each layer that is cut, by its full name.

    Raises:
        InputError: the model has no plan, or it cannot be followed.
    """
    kind = type(module).__name__
    plan: Mapping[str, str | ParallelStyle] | None = getattr(module, "tp_plan", None)
    if not plan:
        raise InputError(
            f"silo.tensor={ranks}: model={kind} has no plan for tensor parallelism.\n"
            "  set silo.shard, which divides any model; or give the model a plan: docs/sharding.md#your-own-plan"
        )
    errors = [
        f"silo.tensor={ranks}: {key}={count} is not a multiple of it.\n  valid: numbers that divide the heads"
        for key, count in _head_counts(module).items()
        if count % ranks
    ]
    unknown = sorted({style for style in plan.values() if isinstance(style, str) and style not in STYLES})
    if unknown:
        errors.append(
            f"silo.tensor={ranks}: the plan of model={kind} has styles that are not known here: {', '.join(unknown)}.\n"
            f"  valid: {', '.join(STYLES)}; set silo.shard, which divides any model"
        )
    layers = dict(module.named_modules())
    styles = {name: style for pattern, style in plan.items() for name in layers if _matches(name, pattern)}
    if not styles:
        errors.append(
            f"silo.tensor={ranks}: the plan of model={kind} names none of its layers: "
            f"{', '.join(first_few(list(plan), MAX_NAMED))}.\n  valid: names of layers, with * for any part of a name"
        )
    others = [
        f"{name} ({type(layers[name]).__name__})"
        for name, style in styles.items()
        if style in CUTTING and not isinstance(layers[name], nn.Linear | nn.Embedding)
    ]
    if others:
        errors.append(
            f"silo.tensor={ranks}: the plan of model={kind} names layers that cannot be cut: "
            f"{', '.join(first_few(others, MAX_NAMED))}.\n  valid: linear layers and embeddings, without adapters; "
            "set silo.shard, which divides any model"
        )
    if errors:
        raise InputError("\n".join(errors))
    return {name: style for name, style in styles.items() if not _is_left_whole(layers[name], style, ranks)}


def _head_counts(module: nn.Module) -> dict[str, int]:
    counts = {key: getattr(module, name, None) for name, key in HEADS.items()}
    settings = getattr(module, "config", None)
    counts |= {f"model.config.{name}": getattr(settings, name, None) for name in CONFIG_HEADS}
    return {key: count for key, count in counts.items() if isinstance(count, int)}


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern, part by part, is the name of a layer."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _is_left_whole(layer: nn.Module, style: str | ParallelStyle, ranks: int) -> bool:
    """Whether a layer has a vocabulary that the ranks do not divide: it is computed by each of them."""
    return style in OF_VOCABULARY and any(len(parameter) % ranks for parameter in layer.parameters())


def _make(style: str | ParallelStyle) -> ParallelStyle:
    return STYLES[style]() if isinstance(style, str) else style


def _check_cuts(module: nn.Module, ranks: int) -> None:
    """Raise InputError if a parameter is cut unevenly: its rows on a rank would not be those of its optimizer."""
    uneven = [
        f"{name} {list(parameter.shape)}"
        for name, parameter in module.named_parameters()
        if (dim := cut_dimension(parameter)) is not None and parameter.shape[dim] % ranks
    ]
    if uneven:
        raise InputError(
            f"silo.tensor={ranks} does not divide {', '.join(first_few(uneven, MAX_NAMED))} of "
            f"model={type(module).__name__} evenly.\n  set widths that it divides"
        )


def cut_dimension(parameter: nn.Parameter) -> int | None:
    """Return the dimension in which a parameter is cut; None if it is whole."""
    if not isinstance(parameter, DTensor):
        return None
    (placement,) = parameter.placements
    return placement.dim if isinstance(placement, Shard) else None


def _tied_parameters(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def _tie_again(module: nn.Module, tied: list[list[str]]) -> None:
    """Make one parameter again of tied ones, of which `parallelize_module` has made one each.

    Raises:
        InputError: they are cut differently.
    """
    for first, *others in tied:
        parameter = module.get_parameter(first)
        for name in others:
            if cut_dimension(module.get_parameter(name)) != cut_dimension(parameter):
                raise InputError(
                    f"silo.tensor: the plan of model={type(module).__name__} cuts {first} and {name} differently, "
                    "which are one parameter.\n  give both layers styles that cut the same dimension, or neither"
                )
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
