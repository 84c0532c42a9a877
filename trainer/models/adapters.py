"""Adapters: a few new parameters beside the frozen ones of a model, by the package peft."""

from __future__ import annotations

import re
import warnings
from copy import deepcopy
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.models.storage import cast_parameter

ADAPTER = "default"  # the name that peft gives to the only adapter of a model, and expects in none of its files
PREFIX = "base_model.model."  # of the names in a file that PeftModel.from_pretrained reads

Train = Literal["both", "B"]


def no_adapter() -> None:
    """Return None: all parameters of the model train that are not frozen."""


def lora(
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    dora: bool = False,
    modules_to_save: list[str] | None = None,
) -> Any:
    """Make the configuration of LoRA (Hu et al. 2021, arXiv 2106.09685), for `attach_adapter`.

    Beside a layer W there is alpha / rank * B A, of which A is random and B zero at first.

    Args:
        rank: number of rows of A, and of columns of B.
        alpha: the scale of the product.
        dropout: of the inputs of A.
        dora: train the norms of the columns of W too (DoRA, Liu et al. 2024, arXiv 2402.09353).
        modules_to_save: the last parts of the names of modules that train as a whole, such as a new head.
    """
    for name, value, is_valid in (("rank", rank, rank >= 1), ("dropout", dropout, 0 <= dropout < 1)):
        if not is_valid:
            raise ValueError(f"adapter.{name}={value}\n  valid: {'1 or more' if name == 'rank' else '0 to below 1'}")
    return _peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, modules_to_save=modules_to_save or None
    )


def attach_adapter(
    module: nn.Module,
    config: Any,
    targets: str | None = None,
    train: Train = "both",
    base_dtype: torch.dtype | None = None,
) -> None:
    """Put an adapter into a model, in place, and freeze all other parameters.

    The model keeps its class. The names of adapted layers get a part more: `q_proj.base_layer.weight`,
    `q_proj.lora_A.default.weight`.

    Args:
        module: the model to change.
        config: a configuration of peft.
        targets: a regular expression, searched in the names of layers; None: those of `config`, or if it names none all
            linear layers but the model's own children, which are heads.
        train: `B` freezes the matrices A of LoRA (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313).
        base_dtype: of the frozen parameters; None: as they are. The adapter is float32.

    Raises:
        ValueError: no layer matches; or peft cannot adapt one that does.
    """
    if not isinstance(config, _peft().PeftConfig):
        raise ValueError(f"adapter= gave a {type(config).__name__}.\n  valid: a configuration of the package peft")
    layers = _layers(module)
    chosen = _chosen(layers, targets)
    if targets is not None or getattr(config, "target_modules", None) is None:
        if not chosen:
            raise ValueError(_nothing_to_adapt(module, layers, targets))
        config = deepcopy(config)
        config.target_modules = chosen
    with warnings.catch_warnings(action="ignore"):  # that it takes matrices of GPT-2 as what they are
        try:
            _peft().inject_adapter_in_model(config, module, ADAPTER)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"adapter={type(config).__name__}: {reason}{_names(layers)}") from error
    for parameter in module.parameters():
        if parameter.requires_grad:
            cast_parameter(parameter, torch.float32)
        elif base_dtype and parameter.is_floating_point():
            cast_parameter(parameter, base_dtype)
    if train == "B":
        _freeze_a(module, config)


def is_adapted(module: nn.Module) -> bool:
    """Return whether a model has an adapter in its layers. A PeftModel is another model around one."""
    return hasattr(module, "peft_config") and not hasattr(module, "get_base_model")


def adapter_parameters(module: nn.Module) -> set[str]:
    """Return the names of the parameters of a model's adapter, frozen ones among them."""
    kind = _config(module).peft_type
    marks = (import_module("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING[kind], f".modules_to_save.{ADAPTER}.")
    return {name for name, _ in module.named_parameters() if any(mark in name for mark in marks)}


def adapter_files(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the tensors by name from which PeftModel.from_pretrained makes a model's adapter."""
    config, kind = deepcopy(_config(module)), type(module)
    config.inference_mode = True
    config.base_model_name_or_path = getattr(getattr(module, "config", None), "name_or_path", None) or None
    config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}  # for AutoPeftModel
    tensors = _peft().get_peft_model_state_dict(module, save_embedding_layers=False)
    return config, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def merge_adapter(module: nn.Module) -> nn.Module:
    """Return a copy of a model with the adapter added to its layers, which has the names of the model without one."""
    merged, layer_class = deepcopy(module), import_module("peft.tuners.tuners_utils").BaseTunerLayer
    wrapper_class = import_module("peft.utils").AuxiliaryTrainingWrapper
    named: list[tuple[str, Any]] = list(merged.named_modules())
    for name, layer in named:
        if isinstance(layer, layer_class):
            layer.merge()
            merged.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, wrapper_class):
            merged.set_submodule(name, layer.unload_and_optionally_merge_module(True, False, None))
    del merged.peft_config
    return merged


def _config(module: nn.Module) -> Any:
    configs: Any = module.peft_config
    return configs[ADAPTER]


def _peft() -> Any:
    try:
        return import_module("peft")
    except ModuleNotFoundError as error:
        raise ValueError(f"adapter= needs the package {error.name}\n  pip install silotrain[adapters]") from error


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have a matrix, by name."""
    weights = {name: getattr(layer, "weight", None) for name, layer in module.named_modules()}
    named = [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() > 1]
    return {name: module.get_submodule(name) for name in named}


def _chosen(layers: dict[str, nn.Module], targets: str | None) -> list[str]:
    if targets is not None:
        return [name for name in layers if re.search(targets, name)]
    return [name for name, layer in layers.items() if "." in name and not isinstance(layer, nn.Embedding)]


def _nothing_to_adapt(module: nn.Module, layers: dict[str, nn.Module], targets: str | None) -> str:
    given = "adapter.targets has no value, and there is" if targets is None else f"adapter.targets={targets} matches"
    return f"{given} no layer of model={type(module).__name__}{_names(layers)}"


def _names(layers: dict[str, nn.Module]) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    numbered = all(name.isdigit() for name in names)
    return f"\n  its layers: {', '.join(layers if numbered else names)}"


def _freeze_a(module: nn.Module, config: Any) -> None:
    matrices = [p for name, p in module.named_parameters() if "lora_A." in name or "lora_embedding_A." in name]
    if not matrices:
        raise ValueError(
            f"adapter.train=B, and a {type(config).__name__} has no matrices A and B\n  set adapter.train=both"
        )
    for parameter in matrices:
        parameter.requires_grad_(False)
