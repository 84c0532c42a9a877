"""Where the metrics of a run go: the console, a file of JSON lines, TensorBoard."""

from trainer.loggers.base import Exhibits, Metrics, Sink
from trainer.loggers.console import Console, choose_screen
from trainer.loggers.jsonl import JsonLines, read_jsonl
from trainer.loggers.tensorboard import TensorBoard
from trainer.loggers.terminal import Screen
from trainer.utils.metric_direction import HEADLINES, more_is_better

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
