"""A finished run is evaluated as it was in training: the same figures on any number of ranks, and by client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.cli.command import work
from tests.support.pool import RankPool
from tests.support.runs import make_clients, make_run
from trainer.commands.evaluate.evaluation import Evaluation, evaluate_in, with_all_examples
from trainer.commands.evaluate.subject import find_subject
from trainer.commands.predict.main import main as predict
from trainer.config.compose import compose_tree
from trainer.config.saved_model import Weights, load_model
from trainer.config.saved_transforms import load_transforms
from trainer.config.schema import read_config
from trainer.data import TableEncoder, digits
from trainer.distributed.topology import distributed
from trainer.loop.stopping import StopCriteria

Ranks = Callable[[int], RankPool]

# The model of each is small, and its averages and best rounds differ from its last.
RUNS = {
    "sync": ["rounds=2", "ema_decay=0.9", "transforms=[standardise,flip]", "model.channels=4", "model.hidden=8"],
    "fedavg": [
        *("rounds=2", "algorithm=fedavg", "silos=2", "partition=dirichlet", "partition.alpha=0.3", "clients=5"),
        *("client_shift=[noise]", "metrics.client_scores=[loss]", "model.norm=batch", "model.channels=4"),
    ],
}


def figures(path: str, weights: Weights, typed: list[str], silos: int, takes_all: bool = False) -> Evaluation:
    subject = find_subject(Path(path), weights, typed)
    config = read_config(compose_tree(subject.overrides(["launch.threads_per_worker=1", *typed])))
    with distributed(silos, device="cpu") as topology:
        return evaluate_in(topology, subject, config, takes_all)


def refusal(path: str) -> str:
    with pytest.raises(ValueError, match="stay with the clients") as error:
        figures(path, "last", [], 1)
    return str(error.value)


def last_round(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run of two ranks, which nothing may be written into any more."""
    made: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp("trained") / name
            ranks(2).run(work, [*RUNS[name], f"run_dir={folder}"])
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o500 if path.is_dir() else 0o400)
        return made[name]

    return train


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.quick_rows(4)
def test_figures_are_those_of_the_run(ranks: Ranks, trained: Callable[[str], Path], name: str, size: int) -> None:
    """To the last digit what is counted, and in the silos of the run every figure; others up to the order of sums."""
    folder = trained(name)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    expected, silos = last_round(folder), 2 if name == "fedavg" and size == 2 else 1
    for found in ranks(size).run(figures, str(folder), "last", [], silos):
        assert {key for key in expected if key.startswith(("test/", "validation/"))} <= found.metrics.keys()
        assert ("client/4/test_loss" in found.metrics) == (name == "fedavg")
        for key, value in found.metrics.items():
            if size == 2 or key.endswith("accuracy"):
                assert value == expected[key], key
            else:
                assert value == pytest.approx(expected[key], rel=1e-6), key
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("weights", ["best", "ema"])
def test_other_weights_of_the_run(ranks: Ranks, trained: Callable[[str], Path], weights: Weights) -> None:
    """An average of the weights has the figures that the run gave it; the best round has those of its round."""
    folder = trained("sync")
    rounds = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    best = json.loads((folder / "result.json").read_text())["best_round"]
    expected, prefix = (rounds[-1], "ema") if weights == "ema" else (rounds[best - 1], "test")
    for found in ranks(2).run(figures, str(folder), weights, [], 1):
        for score in ("loss", "accuracy", "macro_f1"):
            assert found.metrics[f"test/{score}"] == expected[f"{prefix}/{score}"], score


def test_a_pruned_run(ranks: Ranks, trained: Callable[[str], Path], tmp_path: Path) -> None:
    """Its files are of the dense model, with exactly the zeros in place, and have the figures of the run to the bit."""
    keys = [*RUNS["sync"], f"model.init={trained('sync')}/model.safetensors", "model.prune=0.8", "silos=2"]
    ranks(2).run(work, [*keys, "algorithm=fedavg", f"run_dir={tmp_path}"])
    weights = [parameter for parameter in load_model(tmp_path).parameters() if parameter.dim() > 1]
    numbers = torch.cat([weight.flatten() for weight in weights])
    assert int((numbers == 0).sum()) == round(0.8 * len(numbers))
    for kept, prefix in (("last", "test"), ("ema", "ema")):
        for found in ranks(2).run(figures, str(tmp_path), kept, [], 2):
            assert found.metrics["test/loss"] == last_round(tmp_path)[f"{prefix}/loss"]


def test_weights_from_a_file_in_a_model_of_keys(ranks: Ranks, trained: Callable[[str], Path]) -> None:
    """With the keys of the run they are its model."""
    folder = trained("fedavg")
    keys = [key for key in RUNS["fedavg"] if not key.startswith(("silos", "rounds"))]
    (found,) = ranks(1).run(figures, str(folder / "model.safetensors"), "last", keys, 1)
    assert found.metrics["test/accuracy"] == last_round(folder)["test/accuracy"]


def test_other_weights_in_the_model_of_a_run(ranks: Ranks, trained: Callable[[str], Path]) -> None:
    """They get the examples as the run has prepared them: its own average has the figures that it had there."""
    folder = trained("sync")
    (found,) = ranks(1).run(figures, str(folder), "last", [f"model.init={folder}/ema.safetensors"], 1)
    assert found.metrics["test/accuracy"] == last_round(folder)["ema/accuracy"]


@pytest.mark.long
def test_an_adapted_model(ranks: Ranks, tmp_path: Path) -> None:
    """Parameters below the adapter come from where the run had them: the seed."""
    run = tmp_path / "run"
    keys = ["adapter=lora", "adapter.rank=2", r"adapter.targets='\d+$'", "model.channels=4", "rounds=1"]
    ranks(2).run(work, [*keys, f"run_dir={run}"])
    for found in ranks(2).run(figures, str(run), "last", [], 1):
        for score in ("test/loss", "test/accuracy"):
            assert found.metrics[score] == last_round(run)[score]


def test_all_examples_are_those_of_every_set(ranks: Ranks, trained: Callable[[str], Path]) -> None:
    """The accuracy on all of them is that of the plain module, and of the transforms without the data."""
    folder = trained("sync")
    (found,) = ranks(1).run(figures, str(folder), "last", [], 1, True)
    assert found.examples == {"test": 1797, "validation": 0}
    parts = [source.fetch(torch.arange(len(source))) for source in (digits().train, digits().test)]
    inputs, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    inputs, _ = load_transforms(folder).for_evaluation((inputs, targets), torch.device("cpu"))
    assert found.metrics["test/accuracy"] == (load_model(folder)(inputs).argmax(1) == targets).double().mean().item()


def test_other_rows_are_encoded_as_those_of_training(ranks: Ranks, tmp_path: Path) -> None:
    """They lack a category and a class, and have one that was never seen, and gaps."""
    generator = np.random.default_rng(0)
    (tmp_path / "train.csv").write_text(
        "x,city,label\n"
        + "".join(
            f"{generator.normal(row % 3):.4f},{'RBK'[row % 3]},{('cat', 'dog', 'owl')[row % 3]}\n" for row in range(90)
        )
    )
    others = [(2.5, "R", "dog"), ("", "K", "owl"), (-1.0, "Z", "dog"), (0.3, "", "owl"), (9.0, "K", "owl")]
    (tmp_path / "other.csv").write_text(
        "x,city,label\n" + "".join(f"{x},{city},{label}\n" for x, city, label in others)
    )
    keys = ["data=csv", f"data.path={tmp_path}/train.csv", "data.columns.number=[x]", "data.columns.category=[city]"]
    run = tmp_path / "run"
    ranks(1).run(work, [*keys, "model=mlp", "model.inputs=4", "model.classes=3", "rounds=1", f"run_dir={run}"])
    (found,) = ranks(1).run(
        figures, str(run), "last", [f"data.path={tmp_path}/other.csv", "data.validation=0"], 1, True
    )
    encode = TableEncoder.load(run / "columns.json")
    columns = zip(*((x or None, city or None) for x, city, _ in others), strict=True)
    logits = load_model(run)(encode(dict(zip(("x", "city"), columns, strict=True))))
    labels = torch.tensor([("cat", "dog", "owl").index(label) for *_, label in others])
    assert found.metrics["test/accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert found.metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_what_stays_with_clients_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    own = ["algorithm=fedbn", "silos=2", "model.norm=batch", "run.smoke=true"]
    ranks(2).run(work, [*own, f"run_dir={tmp_path}/run"])
    message, again = ranks(2).run(refusal, str(tmp_path / "run"))
    assert message == again


def test_a_run_predicts_what_it_has_measured(ranks: Ranks, trained: Callable[[str], Path], tmp_path: Path) -> None:
    """The accuracy of its predictions, and its evaluation by its engine, are those of its best round, every digit."""
    folder, test = shutil.copytree(trained("sync"), tmp_path / "run"), digits().test
    folder.chmod(0o700)
    best = json.loads((folder / "result.json").read_text())["best_round"]
    expected = json.loads((folder / "metrics.jsonl").read_text().splitlines()[best - 1])
    inputs, targets = test.fetch(torch.arange(len(test)))
    np.savez(tmp_path / "test.npz", x=inputs.numpy())
    predict([str(folder), str(tmp_path / "test.npz"), "--out", str(tmp_path / "predictions.npz")])
    with np.load(tmp_path / "predictions.npz") as predictions:
        assert np.mean(predictions["label"] == targets.numpy()) == expected["test/accuracy"]
        np.testing.assert_allclose(predictions["scores"].sum(1), 1, rtol=1e-5)
    (model,) = (folder / "export").iterdir()
    for found in ranks(2).run(figures, str(model), "last", [], 1):
        assert found.metrics["test/accuracy"] == expected["test/accuracy"]
        assert found.metrics["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


def test_all_examples_leave_none_to_go_by() -> None:
    """A run that went by its validation examples is evaluated on them as on the others."""
    clients = make_clients([8, 8]).split_validation(0.5, 0)
    with distributed(device="cpu") as topology:
        run = make_run(topology, [8, 8], clients=clients, monitor="validation/accuracy", stop=StopCriteria(0.9))
        whole = with_all_examples(run)
    assert (whole.monitor, whole.stop) == (None, StopCriteria())
    assert sum(map(len, whole.clients.test)) == 24
