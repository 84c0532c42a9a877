"""silotrain: synchronous data-parallel and federated training in PyTorch, as one loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer.utils.version import __version__

if TYPE_CHECKING:
    from trainer.config.saved_model import load_model
    from trainer.loop.fit import fit
    from trainer.loop.run import Run

__all__ = ["Run", "__version__", "fit", "load_model"]

_HOMES = {"Run": "trainer.loop.run", "fit": "trainer.loop.fit", "load_model": "trainer.config.saved_model"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import trainer` alone does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
