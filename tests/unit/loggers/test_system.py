"""The load of the machine, beside the metrics of a round."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.laws.cases import Records
from trainer.loggers import JsonLinesLogger, SystemLogger, TensorBoardLogger, read_jsonl
from trainer.loggers import system as module
from trainer.utils.hardware import system_load


def test_the_load_is_measured_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch):
    now, measured, records = [100.0], [], Records()
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    logger = SystemLogger([records], lambda: measured.append(1) or {"cpu_percent": float(len(measured))})
    for at in (100.0, 100.5, 101.0, 101.9, 105.0):
        now[0] = at
        logger.log_round({"round": 1})
    loads = [metrics.get("system/cpu_percent") for metrics in records.rounds]
    assert loads == [2.0, None, 3.0, None, 4.0], "the first measurement begins the time of the next"


def test_it_is_that_of_the_machine():
    system_load(torch.device("cpu"))
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    load = system_load(torch.device("cpu"))
    assert set(load) == {"cpu_percent", "memory_percent", "process_memory_bytes"}
    assert 0 < load["cpu_percent"] <= 100
    assert load["memory_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=10)
    assert load["process_memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_steps_go_to_the_loggers_that_take_them(tmp_path: Path):
    rounds_only, file = Records(), JsonLinesLogger(tmp_path / "metrics.jsonl")
    charts = TensorBoardLogger(tmp_path / "tensorboard", {})
    logger = SystemLogger([rounds_only, file, charts], dict)
    step: dict[str, Any] = {"round": 1, "step": 5, "train/loss": 0.5}
    logger.log_step(step)
    logger.log_round({"round": 1, "train/loss": 0.4})
    logger.finalize({}, rounds_only.exhibits)
    logger.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [step, {"round": 1, "train/loss": 0.4}]
    assert rounds_only.rounds == [{"round": 1, "train/loss": 0.4}]
    assert list((tmp_path / "tensorboard-steps").iterdir())
