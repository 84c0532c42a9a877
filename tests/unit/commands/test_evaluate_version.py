"""An exported version is evaluated by its engine, on the data of its run or on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.exported import weights, write_linear
from trainer.commands.evaluate.evaluation import evaluate_in
from trainer.commands.evaluate.subject import find_subject
from trainer.config.compose import compose_tree
from trainer.config.schema import read_config
from trainer.distributed.topology import distributed
from trainer.service.version import DESCRIPTION, checksums, read_version


def test_its_figures_are_those_of_its_answers(tmp_path: Path) -> None:
    """Whatever has trained it: transforms, a server optimizer and personal steps are not applied again."""
    generator = np.random.default_rng(0)
    rows, labels = generator.normal(size=(90, 4)).astype(np.float32), generator.integers(0, 3, 90)
    np.savez(tmp_path / "data.npz", x=rows, y=labels)
    version = write_linear(tmp_path / "models/linear", 1)
    trained = compose_tree(
        [
            *("data=npz", f"data.path={tmp_path}/data.npz", "model=mlp", "model.inputs=4", "model.classes=3"),
            *("algorithm=fedadam", "transforms=[standardise]", "ema_decay=0.9", "eval.personal_steps=2"),
            *("clients=3", "update_compression=int8", "model.freeze=head"),
        ]
    )
    del trained["run_dir"], trained["launch"]
    (version / "config.yaml").write_text(yaml.safe_dump(trained))
    description = replace(read_version(version), sha256=checksums(version))
    (version / DESCRIPTION).write_text(description.to_json())
    subject = find_subject(version.parent, "last")
    config = read_config(compose_tree(subject.overrides(["launch.device=cpu"])))
    with distributed(1, device="cpu") as topology:
        found = evaluate_in(topology, subject, config, takes_all=True)
    predicted = (rows @ weights(1)).argmax(1)
    assert found.metrics["test/accuracy"] == np.mean(predicted == labels)
    assert found.examples == {"test": 90, "validation": 0} and len(found.clients) == 3


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    version = write_linear(tmp_path / "models/linear", 1)
    (version / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.onnx is not the file that was exported"):
        find_subject(version, "last").preprocessing()
