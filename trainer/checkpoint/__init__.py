"""Checkpoints: the format on disk, who writes what, and the choice of the state to resume from."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint.checkpointer import Checkpointer
    from trainer.checkpoint.resume import ResumePoint, newest_complete
    from trainer.checkpoint.shared_storage import SharedStorage, detect_shared_storage

__all__ = ["Checkpointer", "ResumePoint", "SharedStorage", "detect_shared_storage", "newest_complete"]

_HOMES = {
    "Checkpointer": "checkpointer",
    "ResumePoint": "resume",
    "newest_complete": "resume",
    "SharedStorage": "shared_storage",
    "detect_shared_storage": "shared_storage",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the launcher reads the run folder without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"trainer.checkpoint.{_HOMES[name]}"), name)
