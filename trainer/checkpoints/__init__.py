"""What is kept of a run on disk, how it is written, and what a run goes on from."""

from trainer.checkpoints.checkpoint import Checkpoints
from trainer.checkpoints.disks import Disk, find_disk
from trainer.checkpoints.start import Start, newest_whole

__all__ = ["Checkpoints", "Disk", "Start", "find_disk", "newest_whole"]
