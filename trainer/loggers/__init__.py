"""Where the metrics of a run go: the console, a file of JSON lines, TensorBoardLogger."""

from trainer.loggers.base import FinalArtifacts, Logger, Metrics
from trainer.loggers.console import ConsoleLogger, make_terminal
from trainer.loggers.jsonl import JsonLinesLogger, read_jsonl
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.terminal import Terminal
from trainer.utils.metric_direction import HEADLINES, higher_is_better

__all__ = [
    "HEADLINES",
    "ConsoleLogger",
    "FinalArtifacts",
    "JsonLinesLogger",
    "Metrics",
    "Terminal",
    "Logger",
    "TensorBoardLogger",
    "make_terminal",
    "higher_is_better",
    "read_jsonl",
]
