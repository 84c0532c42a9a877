"""A served run has the figures of the run, over every protocol; while it is trained, each answer is of one version."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http

from tests.cli.command import work
from tests.support.pool import RankPool
from tests.support.serving import serving
from trainer.commands.export.main import main as export
from trainer.commands.serve.exported_run import exported_models
from trainer.data import digits
from trainer.service.version import read_version, version_numbers

SMALL = ["model.channels=4", "model.hidden=8", "launch.threads_per_worker=1"]


def test_its_accuracy_is_that_of_the_run_to_the_last_digit(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    run, models = tmp_path / "run", tmp_path / "models"
    ranks(2).run(work, ["rounds=2", f"run_dir={run}", *SMALL])
    assert export([str(run), "--to", str(models), "--name", "digits", "--weights", "last"]) == 0
    images, labels = digits().test.fetch(torch.arange(len(digits().test)))
    inputs, accuracies = images.numpy(), list[float]()
    with serving(models) as server:
        with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
            tensor = tritonclient.grpc.InferInput("inputs", inputs.shape, "FP32").set_data_from_numpy(inputs)
            answers = [client.infer("digits", [tensor])]
        with tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://")) as client:
            for binary in (True, False):
                given = tritonclient.http.InferInput("inputs", inputs.shape, "FP32")
                answers.append(client.infer("digits", [given.set_data_from_numpy(inputs, binary_data=binary)]))
    for answer in answers:
        accuracies.append(float((answer.as_numpy("label") == labels.numpy()).mean()))
        np.testing.assert_array_equal(answer.as_numpy("outputs"), answers[0].as_numpy("outputs"))
    assert accuracies == [json.loads((run / "result.json").read_text())["test/accuracy"]] * 3


@pytest.mark.long
def test_a_run_is_served_while_it_is_trained_and_its_accuracy_never_falls(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rounds = ["rounds=4000", "optimizer.lr=0.002", "algorithm=fedavg", "clients=4", "launch.nproc_per_node=1"]
    command = [sys.executable, "-m", "trainer", f"run_dir={run}", *rounds, *SMALL]
    training = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    try:
        while not list(run.glob("checkpoints/*")) and training.poll() is None:
            time.sleep(0.1)
        served = dict[int, float]()
        with exported_models(run) as models, serving(models) as server:
            (name,) = server.service.repository.models
            request = (models / name / "1" / "example.json").read_bytes()
            ends = time.monotonic() + 150
            while len(served) < 3 and time.monotonic() < ends:
                answer = httpx.post(f"{server.http_url}/v2/models/{name}/infer", content=request)
                assert answer.status_code == 200
                version = server.service.repository.find(name)
                served[version.number] = version.description.metrics[version.description.headline] or 0.0
                time.sleep(0.05)
    finally:
        training.terminate()
        training.wait(60)
    figures = [served[number] for number in sorted(served)]
    assert len(figures) == 3
    assert figures == sorted(figures)


@pytest.mark.long
def test_a_finished_run_is_exported_once(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    ranks(2).run(work, ["rounds=1", f"run_dir={tmp_path / 'run'}", *SMALL])
    for _ in range(2):
        with exported_models(tmp_path / "run") as models:
            (model,) = models.iterdir()
            assert version_numbers(model) == [1]
            assert read_version(model / "1").headline


def test_a_folder_of_models_is_served_as_it_is(tmp_path: Path) -> None:
    with exported_models(tmp_path) as models:
        assert models == tmp_path
