"""What is kept of a run on disk, how it is written, and what a run goes on from."""

from trainer.checkpoint.checkpointer import Checkpoints
from trainer.checkpoint.resume import Start, newest_whole
from trainer.checkpoint.shared_storage import Disk, find_disk

__all__ = ["Checkpoints", "Disk", "Start", "find_disk", "newest_whole"]
