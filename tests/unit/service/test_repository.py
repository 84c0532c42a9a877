"""The newest whole versions are served; whatever is damaged or foreign is passed over, and named."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest

from tests.support.exported import write_linear
from trainer.service.errors import NotFoundError
from trainer.service.meters import Meters
from trainer.service.repository import Repository
from trainer.service.version import DESCRIPTION, EXAMPLE_RESPONSE, ONNX, sha256


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path, 1, Meters())


def served(repository: Repository) -> dict[str, list[int]]:
    repository.refresh()
    return {model: list(versions) for model, versions in repository.models.items()}


def test_the_newest_two_versions_of_each_model_are_served(repository, tmp_path):
    for number in (1, 2, 10):
        write_linear(tmp_path / "linear", number)
    write_linear(tmp_path / "other", 1)
    assert served(repository) == {"linear": [10, 2], "other": [1]}
    assert repository.find("linear").number == 10
    assert repository.find("linear", "2").number == 2
    with pytest.raises(NotFoundError, match=r"version of linear: got '1', wanted 10 or 2"):
        repository.find("linear", "1")
    with pytest.raises(NotFoundError, match=r"model: got 'liner', wanted linear or other"):
        repository.find("liner")


def test_one_model_or_one_version_is_served_alone(tmp_path):
    folder = write_linear(tmp_path / "linear", 4)
    write_linear(tmp_path / "linear", 5)
    assert served(Repository(tmp_path / "linear", 1, Meters())) == {"linear": [5, 4]}
    assert served(Repository(folder, 1, Meters())) == {"linear": [4]}


def test_a_newer_version_takes_over_and_a_removed_one_gives_way(repository, tmp_path):
    write_linear(tmp_path / "linear", 1)
    assert served(repository) == {"linear": [1]}
    before = repository.find("linear")
    write_linear(tmp_path / "linear", 2)
    write_linear(tmp_path / "linear", 3)
    assert served(repository) == {"linear": [3, 2]}
    shutil.rmtree(tmp_path / "linear" / "3")
    assert served(repository) == {"linear": [2, 1]}
    np.testing.assert_array_equal(before.engine.run({"inputs": np.ones((1, 4), np.float32)})["label"], [2])


def test_what_is_served_stays_when_its_folder_is_gone(repository, tmp_path):
    write_linear(tmp_path / "linear", 1)
    assert served(repository) == {"linear": [1]}
    shutil.rmtree(tmp_path / "linear")
    assert served(repository) == {"linear": [1]}


def test_a_version_that_was_written_anew_is_loaded_anew(repository, tmp_path):
    write_linear(tmp_path / "linear", 1)
    repository.refresh()
    before = repository.find("linear")
    shutil.rmtree(tmp_path / "linear")
    write_linear(tmp_path / "linear", 1, metrics={"test/accuracy": 0.5})
    repository.refresh()
    assert repository.find("linear") is not before
    assert repository.find("linear").description.metrics == {"test/accuracy": 0.5}


def other_graph(folder):
    (folder / ONNX).write_bytes((folder / ONNX).read_bytes() + b"\0")


def no_description(folder):
    (folder / DESCRIPTION).unlink()


def other_answers(folder):
    """Export a model that answers here otherwise than where it was exported."""
    response, description = (json.loads((folder / name).read_text()) for name in (EXAMPLE_RESPONSE, DESCRIPTION))
    response["outputs"][0]["data"][0] += 1.0
    (folder / EXAMPLE_RESPONSE).write_text(json.dumps(response))
    description["sha256"][EXAMPLE_RESPONSE] = sha256(folder / EXAMPLE_RESPONSE)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def scalar_input(folder):
    description = json.loads((folder / DESCRIPTION).read_text())
    description["inputs"][0]["shape"] = []
    (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (other_graph, "model.onnx is not the file that was exported"),
        (no_description, "it has no model.json"),
        (scalar_input, "list index out of range"),
        (other_answers, "outputs of its example is another one here"),
    ],
)
def test_a_damaged_version_is_passed_over_once_until_it_is_whole(repository, tmp_path, caplog, damage, reason):
    write_linear(tmp_path / "linear", 1)
    repository.refresh()
    damage(write_linear(tmp_path / "linear", 2))
    with caplog.at_level(logging.WARNING):
        assert served(repository) == served(repository) == {"linear": [1]}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "linear: version 2 is passed over" in caplog.text
    assert reason in caplog.text
    refused = repository.meters.registry.get_sample_value("silotrain_model_versions_refused_total", {"model": "linear"})
    assert refused == 1
    shutil.rmtree(tmp_path / "linear" / "2")
    write_linear(tmp_path / "linear", 2)
    assert served(repository) == {"linear": [2, 1]}
