"""What is kept of a run on disk, how it is written, and what a run goes on from."""

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.resume import ResumePoint, newest_complete
from trainer.checkpoint.shared_storage import SharedStorage, detect_shared_storage

__all__ = ["Checkpointer", "SharedStorage", "ResumePoint", "detect_shared_storage", "newest_complete"]
