"""The experiments of conf/: each composes and runs, and a small part of it beats a constant answer."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.command import work
from tests.support.datasets import FILES
from trainer.config.compose import compose_tree
from trainer.config.groups import CONF
from trainer.data import digits, mnist, shakespeare
from trainer.data.readers.mnist import FASHION_FOLDER
from trainer.data.readers.text import BYTES

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CIFAR = Path(os.environ.get("SILOTRAIN_CIFAR10", "data/cifar-10-batches-bin"))
MNIST = Path(os.environ.get("SILOTRAIN_MNIST", Path(__file__).parents[2] / "../shared/data/mnist"))

# For each experiment with real data: overrides for a part of it, and the margin by which its test accuracy exceeds that
# of always answering with the most frequent class. Those of LONG take minutes.
PARTS = {
    "digits": (["rounds=10"], 0.5),
    "digits_fedavg": (["rounds=4"], 0.3),
    "mnist_fedavg": (["rounds=3"], 0.5),
    "mnist": (["rounds=1", "round.steps=60"], 0.6),
    "mcmahan_2nn": (["rounds=3"], 0.5),
    "mcmahan_cnn": (["rounds=2"], 0.4),
    "scaffold_mnist": (["rounds=4"], 0.3),
    "fashion": (["rounds=1", "round.steps=60"], 0.4),
    "fashion_dirichlet": (["rounds=2"], 0.2),
    "cifar10_resnet": (["rounds=1", "round.steps=60"], 0.15),
}
LONG = ("mnist", "mcmahan_cnn", "fashion", "fashion_dirichlet", "cifar10_resnet")
TEXTS = {
    "shakespeare": ["rounds=1", "round.steps=150"],
    "diloco_shakespeare": ["rounds=3", "round.steps=50"],
    "shakespeare_fedavg": ["rounds=8"],
}


# Of experiments with data of the user's own: what they need, and a smaller model.
NEEDED = {
    "chat_lora": [
        *("data.path=chat.jsonl", "data.tokenizer=tokenizer", "model.config.hidden_size=32"),
        *("model.config.intermediate_size=64", "model.config.vocab_size=400"),
    ],
    "clinic": [
        *("data.columns.number=[x,y]", "data.columns.category=[]", "data.targets=label", "data.classes=3"),
        *("data.path=clinic.csv", "model.inputs=2", "model.classes=3", "monitor=null", "metrics.client_scores=[]"),
    ],
}


def composed(experiment: str) -> dict[str, Any]:
    return compose_tree([f"experiment={experiment}", *NEEDED.get(experiment, ())])


def data_of(experiment: str) -> str:
    """Return the data set that an experiment chooses, such as mnist."""
    return composed(experiment)["data"]["_target_"].rpartition(".")[2]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.quick_rows(2)
def test_every_experiment_takes_two_steps(ranks, experiment: str, tmp_path: Path) -> None:
    """The files are small ones in the format of its data set, with fewer clients."""
    tree, files = composed(experiment), tmp_path / "files"
    files.mkdir()
    few = ["clients=2"] if isinstance(tree["clients"], int) or tree["client_sampling"].get("clients_per_round") else []
    few += ["client_sampling.clients_per_round=2"] if tree["client_sampling"].get("clients_per_round") else []
    target = [override for override in FILES[data_of(experiment)](files) if not override.startswith("model=")]
    if tree["model"]["_target_"].endswith((".CNN", ".ResNet", ".Logistic", ".from_transformers")):
        target = [override for override in target if not override.startswith("model.")]
    small = NEEDED.get(experiment, ())
    overrides = ["run.smoke=true", f"experiment={experiment}", *small, *target, *few, "data.validation=0"]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run/state.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_says_what_to_expect(experiment: str) -> None:
    """The first comment of the file has the expected accuracy or perplexity."""
    _, comment, *_ = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert comment.startswith("# ") and ("%" in comment or "perplexity" in comment)


@pytest.mark.parametrize(
    "experiment", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in PARTS]
)
@pytest.mark.quick_rows(2)
def test_a_part_of_it_beats_the_most_frequent_class(ranks, experiment: str, tmp_path: Path) -> None:
    part, margin = PARTS[experiment]
    if data_of(experiment) == "mnist":
        if not MNIST.is_dir():
            pytest.skip("no MNIST: set SILOTRAIN_MNIST to the folder of its four IDX files")
        part = [*part, f"data.root={MNIST}"]
    if data_of(experiment) == "cifar10":
        if not CIFAR.is_dir():
            pytest.skip("no CIFAR-10: set SILOTRAIN_CIFAR10 to the folder of its six binary files")
        part = [*part, f"data.root={CIFAR}"]
    if data_of(experiment) == "fashion_mnist" and not Path(FASHION_FOLDER).is_dir():
        pytest.skip("no Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    ranks(2).run(work, [f"experiment={experiment}", *part, f"run_dir={tmp_path}"])
    assert json.loads((tmp_path / "result.json").read_text())["test/accuracy"] >= constant(experiment) + margin


def constant(experiment: str) -> float:
    """Return the test accuracy of always answering with the most frequent class."""
    if data_of(experiment) in ("fashion_mnist", "cifar10"):
        return 0.1
    test = (digits() if data_of(experiment) == "digits" else mnist(MNIST)).test
    assert test.labels is not None
    return np.bincount(test.labels).max() / len(test)


@pytest.mark.long
@pytest.mark.parametrize("experiment", TEXTS)
def test_a_part_of_it_beats_the_frequencies_of_letters(ranks, experiment: str, tmp_path: Path) -> None:
    """The test perplexity is less than 0.8 times that of the letter frequencies."""
    ranks(2).run(work, [f"experiment={experiment}", *TEXTS[experiment], f"run_dir={tmp_path}"])
    test = shakespeare().test
    _, targets = test.fetch(torch.arange(len(test)))
    parts = targets.flatten().bincount(minlength=BYTES).double() / targets.numel()
    frequencies = math.exp(-sum(part * math.log(part) for part in parts.tolist() if part))
    assert json.loads((tmp_path / "result.json").read_text())["test/perplexity"] <= 0.8 * frequencies
