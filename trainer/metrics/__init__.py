"""Where the metrics of a run go: the console, a file of JSON lines, TensorBoard."""

from trainer.metrics.console import Console, choose_screen
from trainer.metrics.direction import HEADLINES, more_is_better
from trainer.metrics.jsonl import JsonLines, read_jsonl
from trainer.metrics.screen import Screen
from trainer.metrics.sink import Exhibits, Metrics, Sink
from trainer.metrics.tensorboard import TensorBoard

__all__ = [
    "HEADLINES",
    "Console",
    "Exhibits",
    "JsonLines",
    "Metrics",
    "Screen",
    "Sink",
    "TensorBoard",
    "choose_screen",
    "more_is_better",
    "read_jsonl",
]
