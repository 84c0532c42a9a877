"""The files of a run folder, the summary on the console, and the charts in TensorBoard."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from tests.cli.command import HERE, Ended, Shell, printed_by_work
from tests.cli.conftest import Trained
from tests.support.disk import assert_trees_equal
from trainer.checkpoint import newest_complete
from trainer.checkpoint.run_dir import CHANGEABLE_KEYS
from trainer.config.compose import compose_tree
from trainer.loggers import read_jsonl
from trainer.loggers.messages import number
from trainer.utils.trees import flatten

FEDAVG = (
    "algorithm=fedavg",
    "silos=2",
    "partition=dirichlet",
    "partition.alpha=0.1",
    "rounds=3",
    "eval.every_rounds=2",
    "run_dir=outputs/my digits",
)
RESULT_KEYS = {
    "round",
    "examples",
    "seconds",
    "examples_per_second",
    "memory/peak_bytes",
    "train/loss",
    "test/loss",
    "test/accuracy",
    "bytes_between_silos",
}


@pytest.fixture(scope="module")
def fedavg_run(ranks, shell: Shell) -> Trained:
    """Run three rounds of two silos on live ranks; an error would have ended them."""
    out = ranks(2).run(printed_by_work, ["launch.nproc_per_node=2", *FEDAVG], str(shell.folder))[0]
    return Trained(FEDAVG, shell.folder / "outputs/my digits", Ended(0, out, ""))


@pytest.fixture(scope="module", params=["sync", "fedavg"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(f"{request.param}_run")


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_run_that_finished_says_so(trained: Trained) -> None:
    assert trained.ended.code == 0
    assert trained.ended.err == ""
    assert json.loads((trained.folder / "state.json").read_text())["status"] == "finished"


def test_the_folder_holds_what_scripts_look_for_and_nothing_else(trained: Trained) -> None:
    files = {"config.yaml", "state.json", "metrics.jsonl", "result.json", "console.log"}
    files |= {"model.safetensors", "best.safetensors", "signature.json"}
    folders = {"tensorboard", "checkpoints", "logs"} | (
        {"tensorboard-clients"} if "silos=2" in trained.overrides else set()
    )
    assert {path.name for path in trained.folder.iterdir()} == files | folders
    assert {path.name for path in (trained.folder / "logs").iterdir()} == {"rank-0.log", "rank-1.log", "starts.json"}
    assert len(list((trained.folder / "tensorboard").iterdir())) == 1
    assert "DEBUG" not in (trained.folder / "logs/rank-0.log").read_text()


def test_a_run_makes_one_folder(sync_run: Trained) -> None:
    """Its workers make none of their own."""
    assert [path.name for path in sync_run.folder.parent.iterdir() if path.is_dir()] == ["sync"]


def test_the_configuration_is_the_resolved_one(trained: Trained) -> None:
    """It has the number of clients with which the run began."""
    stored = yaml.safe_load((trained.folder / "config.yaml").read_text())
    silos = stored["silos"]
    assert stored == compose_tree([*HERE, *trained.overrides]) | {"clients": silos}


def test_the_result_is_the_last_round_and_the_totals(trained: Trained) -> None:
    result, rounds = result_of(trained.folder), read_jsonl(trained.folder / "metrics.jsonl")
    assert result.keys() >= RESULT_KEYS
    assert [metrics["round"] for metrics in rounds] == list(range(1, result["round"] + 1))
    assert sum(metrics["round/examples"] for metrics in rounds) == result["examples"]
    assert all(rounds[-1][key] == result[key] for key in RESULT_KEYS - {"examples_per_second"})
    seconds = sum(metrics["seconds/round"] for metrics in rounds)
    assert result["examples_per_second"] == pytest.approx(result["examples"] / seconds)
    assert seconds < result["seconds"]
    assert not any(key.startswith("client/") for key in result)


def test_the_newest_checkpoint_is_that_of_the_last_round(trained: Trained) -> None:
    """The exported model equals it."""
    checkpoints = trained.folder / "checkpoints"
    rounds = result_of(trained.folder)["round"]
    newest = newest_complete(checkpoints)
    assert newest is not None and newest.folder.name == f"round-{rounds:06d}" and newest.errors() == []
    assert_trees_equal(load_file(trained.folder / "model.safetensors"), newest.load("model"))
    kept = {path.name for path in checkpoints.iterdir() if path.is_dir()}
    assert kept == {f"round-{rounds:06d}", f"round-{rounds - 1:06d}"}


def test_the_console_says_who_trains_a_line_a_round_and_the_result(trained: Trained) -> None:
    result, out = result_of(trained.folder), trained.ended.out
    assert re.search(r"^workers +2 on cpu, threads each: 1;", out)
    rounds = re.findall(rf"^round (\d+)/{result['round']} ", out, re.MULTILINE)
    assert [int(round) for round in rounds] == list(range(1, result["round"] + 1))
    message = dict(re.findall(r"^(\S+(?: \S+)*)  +(.+)$", out, re.MULTILINE))
    for key in ("test/accuracy", "test/loss", "train/loss", "examples_per_second", "seconds"):
        assert message[key] == number(result[key])
    run_dir = trained.overrides[-1].removeprefix("run_dir=")
    assert message["run folder"] == run_dir
    command, *arguments = shlex.split(message["TensorBoard"])
    assert shutil.which(command) and arguments == ["--logdir", run_dir]


def test_one_silo_exchanges_nothing(sync_run: Trained) -> None:
    rounds = read_jsonl(sync_run.folder / "metrics.jsonl")
    assert all(metrics["bytes_between_silos"] == 0 for metrics in rounds)
    assert not any(key.startswith(("client/", "slowest/", "delta/")) for metrics in rounds for key in metrics)
    assert "slowest" not in sync_run.ended.out


def test_silos_exchange_their_models_once_a_round(fedavg_run: Trained) -> None:
    """Each of two silos sends and receives the model's 43,050 parameters as float32, aligned to 64 bytes."""
    rounds = read_jsonl(fedavg_run.folder / "metrics.jsonl")
    sent = [metrics["bytes_between_silos"] for metrics in rounds]
    assert [sent[0] * count for count in (1, 2, 3)] == sent
    assert 2 * 4 * 43_050 <= sent[0] < 2 * (4 * 43_050 + 64 * 10)


def test_rounds_that_were_not_evaluated_have_no_scores(fedavg_run: Trained) -> None:
    """Every second round is evaluated, and the last one."""
    rounds = read_jsonl(fedavg_run.folder / "metrics.jsonl")
    assert ["test/accuracy" in metrics for metrics in rounds] == [False, True, True]
    assert ["client/0/test_accuracy" in metrics for metrics in rounds] == [False, True, True]
    assert all("client/0/train_loss" in metrics and "delta/norm" in metrics for metrics in rounds)


def test_clients_are_judged_one_by_one_and_pooled(fedavg_run: Trained) -> None:
    """The table on the console has the numbers of test examples, by which the pooled accuracy is weighted."""
    last = read_jsonl(fedavg_run.folder / "metrics.jsonl")[-1]
    table = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+)((?: +\d+){10})$", fedavg_run.ended.out, re.MULTILINE)
    assert [client for client, *_ in table] == ["0", "1"]
    assert all(int(train) == sum(map(int, labels.split())) for _, train, _, _, labels in table)
    weights = [int(test) for _, _, _, test, _ in table]
    accuracies = [last[f"client/{client}/test_accuracy"] for client in (0, 1)]
    assert np.average(accuracies, weights=weights) == pytest.approx(last["test/accuracy"])
    assert last["clients/worst_accuracy"] == min(accuracies)
    assert -1 <= last["delta/cosine"] <= 1
    assert last["delta/norm"] <= max(last[f"client/{client}/delta_norm"] for client in (0, 1))


def test_the_slowest_silo_is_named_each_round(fedavg_run: Trained) -> None:
    named = re.findall(r"slowest silo (\d): (?:data|compute) ", fedavg_run.ended.out)
    assert named == [str(metrics["slowest/silo"]) for metrics in read_jsonl(fedavg_run.folder / "metrics.jsonl")]


def events_in(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def events(trained: Trained) -> EventAccumulator:
    return events_in(trained.folder / "tensorboard")


def test_the_charts_are_the_metrics(trained: Trained, events: EventAccumulator) -> None:
    """The tags are those of metrics.jsonl, and each value is the float32 of the one there; null is NaN."""
    rounds = read_jsonl(trained.folder / "metrics.jsonl")
    tags = {key for metrics in rounds for key in metrics} - {"round"}
    of_clients = {tag for tag in tags if tag.startswith("client/")}
    clients = events_in(trained.folder / "tensorboard-clients") if of_clients else None
    assert set(events.Tags()["scalars"]) == tags - of_clients
    assert not clients or set(clients.Tags()["scalars"]) == of_clients
    for tag in tags:
        expected = {metrics["round"]: metrics[tag] for metrics in rounds if tag in metrics}
        charts = clients if clients and tag in of_clients else events
        charted = {event.step: event.value for event in charts.Scalars(tag)}
        assert charted.keys() == expected.keys(), tag
        for round, value in expected.items():
            wanted = math.nan if value is None else value
            assert np.array_equal(np.float32(charted[round]), np.float32(wanted), equal_nan=True), (tag, round)


def test_the_hyperparameters_are_what_decides_the_result(trained: Trained, events: EventAccumulator) -> None:
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    stored = flatten(yaml.safe_load((trained.folder / "config.yaml").read_text()))
    assert start.hparams.keys() == {key for key in stored if not key.startswith(CHANGEABLE_KEYS)}
    assert start.hparams["optimizer.lr"].number_value == stored["optimizer.lr"]
    assert start.hparams["algorithm._target_"].string_value == stored["algorithm._target_"]
    assert start.hparams["optimizer.exclude_norm_bias_decay"].WhichOneof("kind") == "bool_value"


def test_the_confusion_is_pictured_at_the_end(trained: Trained, events: EventAccumulator) -> None:
    (image,) = events.Images("test/confusion")
    assert image.step == result_of(trained.folder)["round"]
    assert image.encoded_image_string.startswith(b"\x89PNG")
