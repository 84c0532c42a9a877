"""The adapter of a configuration, put into its model."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config.instantiate import instantiate
from trainer.config.schema import ComponentConfig
from trainer.models.adapters import attach_adapter


def adapt(module: nn.Module, component: ComponentConfig) -> None:
    """Put the adapter of a configuration into a model, if it has one."""
    adapter = instantiate("adapter", component)
    if adapter is not None:
        dtype = component.get("base_dtype")
        base_dtype = getattr(torch, dtype) if dtype else None
        attach_adapter(module, adapter, component.get("targets"), component.get("train", "both"), base_dtype)
