"""Examples for calibration and comparison: which they are, and that they are raw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tests.support.runs import make_clients, make_run
from trainer.data.transforms import Compose, Normalise
from trainer.distributed.topology import Topology
from trainer.export.raw_examples import calibration_batches, evaluation_batches, evaluation_part

ALONE = Topology(0, 1, 0, 0, (1,), torch.device("cpu"), None, None)
TRANSFORMS = Compose({"normalise": Normalise(mean=1.0, std=2.0)})


def rows(inputs: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in inputs}


def test_calibration_takes_512_different_training_examples_by_the_seed_of_the_run():
    run = make_run(ALONE, [300, 400], transforms=TRANSFORMS)
    drawn = [batch["images"] for batch in calibration_batches(run, ["images"])]
    assert [len(batch) for batch in drawn] == [64] * 8
    training, _ = run.data.train.fetch(torch.arange(700))
    assert len(rows(np.concatenate(drawn))) == 512
    assert rows(np.concatenate(drawn)) < rows(training.numpy())
    again, others = calibration_batches(run, ["images"]), calibration_batches(replace(run, seed=1), ["images"])
    assert all(np.array_equal(batch["images"], one) for batch, one in zip(again, drawn, strict=True))
    assert not np.array_equal(others[0]["images"], drawn[0])


def test_small_data_are_used_whole_without_those_held_out_for_validation():
    clients = replace(make_clients([30, 20]), validation=(np.arange(40, 45), np.arange(45, 50)))
    run = make_run(ALONE, [30, 20], clients=replace(clients, train=(np.arange(30), np.arange(30, 40))))
    training, _ = run.data.train.fetch(torch.arange(40))
    assert rows(np.concatenate([each["inputs"] for each in calibration_batches(run, ["inputs"])])) == rows(
        training.numpy()
    )
    assert evaluation_part(run) == "validation"
    ((inputs, targets),) = evaluation_batches(run, "validation", ["inputs"])
    expected = run.data.train.fetch(torch.arange(40, 50))
    assert np.array_equal(inputs["inputs"], expected[0].numpy())
    assert torch.equal(targets, expected[1])


def test_evaluation_has_every_test_example_once_before_the_transforms():
    run = make_run(ALONE, [20, 20], transforms=TRANSFORMS, **{"eval.batch_size": 3})
    assert evaluation_part(run) == "test"
    batches = list(evaluation_batches(run, "test", ["inputs"]))
    assert [len(targets) for _, targets in batches] == [3, 3, 2]
    expected, labels = run.data.test.fetch(torch.from_numpy(np.concatenate(run.clients.test)))
    assert np.array_equal(np.concatenate([inputs["inputs"] for inputs, _ in batches]), expected.numpy())
    assert torch.equal(torch.cat([targets for _, targets in batches]), labels)
