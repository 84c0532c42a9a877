"""Models as torch.compile makes them, and how often it had to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_module(module: nn.Module, backend: str | None) -> Callable[..., Any]:
    """What computes as the module does, compiled when it is first called; the module itself without a backend."""
    return torch.compile(module, backend=backend) if backend else module


def count_compiled_graphs() -> int:
    """The graphs that were compiled in this process: more than at first, when shapes or flags were new."""
    import torch._dynamo.utils  # only where it is there anyway: it takes a second to import

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
