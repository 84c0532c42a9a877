"""Compilation by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_module(module: nn.Module, backend: str | None) -> Callable[..., Any]:
    """Compile a module, at its first call. Without a backend return the module itself."""
    return torch.compile(module, backend=backend) if backend else module


def count_compiled_graphs() -> int:
    """Return the number of graphs compiled in this process; it grows when new shapes or flags cause a recompilation."""
    import torch._dynamo.utils  # takes a second, unless something has been compiled

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
