"""Loggers: the console, a file of JSON lines, TensorBoard, Weights & Biases and MLflow."""

from trainer.loggers.base import (
    HEADLINES,
    FinalArtifacts,
    Logger,
    Metrics,
    StepLogger,
    TextLogger,
    TextSample,
    higher_is_better,
)
from trainer.loggers.console import ConsoleLogger
from trainer.loggers.jsonl import JsonLinesLogger, iter_jsonl, read_jsonl
from trainer.loggers.system import SystemLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.terminal import Terminal, make_terminal

__all__ = [
    "HEADLINES",
    "ConsoleLogger",
    "FinalArtifacts",
    "JsonLinesLogger",
    "Logger",
    "Metrics",
    "StepLogger",
    "SystemLogger",
    "TensorBoardLogger",
    "Terminal",
    "TextLogger",
    "TextSample",
    "higher_is_better",
    "iter_jsonl",
    "make_terminal",
    "read_jsonl",
]
