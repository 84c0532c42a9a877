"""Checkpoints: the format on disk, who writes what, and the choice of the state to resume from."""

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import ResumePoint, newest_complete
from trainer.checkpoint.shared_storage import SharedStorage, detect_shared_storage

__all__ = ["Checkpointer", "ResumePoint", "SharedStorage", "detect_shared_storage", "newest_complete"]
