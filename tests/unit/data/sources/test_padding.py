"""Examples of different lengths: how they are padded, joined, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from trainer.data import MapDatasetSource, Padding, PerClientSource, TensorSource
from trainer.data.sources.base import DataSplits
from trainer.data.transforms import Compose, MaskTokens, Standardise
from trainer.tasks import Classification


class Rows(Dataset[Any]):
    """Row i counts to i, as a tensor, an array or a list."""

    def __init__(self, kind: Any = torch.tensor, examples: int = 5):
        self.kind, self.examples = kind, examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Any:
        return {"tokens": self.kind(list(range(index + 1))), "size": float(index)}, self.kind([index] * (index + 1))


PADDING = Padding({"tokens": 9}, targets=-100)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_rows_are_padded_to_the_longest_of_their_batch(kind: Any) -> None:
    inputs, targets = MapDatasetSource(Rows(kind), collate_fn=PADDING).fetch(torch.tensor([0, 2]))
    assert inputs["tokens"].tolist() == [[0, 9, 9], [0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert inputs["size"].tolist() == [0.0, 2.0]
    assert targets.tolist() == [[0, -100, -100], [2, 2, 2]]


def test_a_mask_that_the_examples_bring_is_padded_and_none_is_added_to_those_that_want_none() -> None:
    masked = ({"tokens": torch.ones(size), "attention_mask": torch.zeros(size)} for size in (1, 2))
    inputs, _ = Padding({"tokens": 0})([(row, 0) for row in masked])
    assert inputs["attention_mask"].tolist() == [[0, 0], [0, 0]]
    inputs, _ = Padding({"tokens": 0}, mask=None)([({"tokens": torch.ones(size)}, 0) for size in (1, 2)])
    assert list(inputs) == ["tokens"]


def test_rows_of_vectors_are_padded_too() -> None:
    inputs, _ = Padding({"sound": 0.5})([({"sound": torch.ones(size, 2)}, 0) for size in (1, 2)])
    assert inputs["sound"].tolist() == [[[1, 1], [0.5, 0.5]], [[1, 1], [1, 1]]]


def test_clients_of_different_lengths_are_joined_as_one_source() -> None:
    source = MapDatasetSource(Rows(), collate_fn=PADDING)
    both = PerClientSource([5, 5], {0: source, 1: source}, [0, 0], [0, 0])
    ours, theirs = both.fetch(torch.tensor([4, 5, 1])), source.fetch(torch.tensor([4, 0, 1]))
    assert both.is_read_by_batch and both.padding is PADDING
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0]) and torch.equal(ours[1], theirs[1])


def test_an_empty_batch_has_the_names_of_a_full_one() -> None:
    inputs, targets = MapDatasetSource(Rows(), collate_fn=PADDING).fetch(torch.empty(0, dtype=torch.int64))
    assert {name: list(part.shape) for name, part in inputs.items()} == {
        "tokens": [0, 1],
        "size": [0],
        "attention_mask": [0, 1],
    }
    assert targets.shape == (0, 1)


class Odd(Rows):
    def __init__(self, item: Any):
        super().__init__()
        self.item = item

    def __getitem__(self, index: int) -> Any:
        return self.item


@pytest.mark.parametrize(
    ("dataset", "collate", "message"),
    [
        (Rows(), None, r"Rows: 2 items make no batch: .*equal size(.|\n)*collate_fn=Padding"),
        (Rows(), Padding({"input_ids": 0}), "Padding needs inputs that are a dict with input_ids; got tokens, size"),
        (Odd((torch.ones(2), 0)), PADDING, "a dict with tokens; got a Tensor"),
        (Odd(({"text": "a word"}, 0)), None, r"Odd: the inputs of a batch are no tensors: text(.0)? is a str"),
        (Odd({"input_ids": 0, "labels": 1}), None, "not .input, target. pairs"),
        (Odd((0, {"box": torch.ones(2), "kind": "cat"})), None, "the targets of a batch are no tensors: kind"),
    ],
)
def test_items_that_make_no_batch_are_refused(dataset: Rows, collate: Any, message: str) -> None:
    source = MapDatasetSource(dataset, **({"collate_fn": collate} if collate else {}))
    with pytest.raises(ValueError, match=message):
        source.fetch(torch.tensor([0, 1]))


def test_tensors_in_memory_need_as_many_rows_each() -> None:
    with pytest.raises(ValueError, match=r"inputs: its tensors have different numbers of rows: a 2, b 3"):
        TensorSource({"a": torch.ones(2), "b": torch.ones(3)}, torch.ones(2))
    with pytest.raises(ValueError, match=r"2 inputs and 3 targets(.|\n)*inputs of shape a \[2\], b \[2, 1\]"):
        TensorSource({"a": torch.ones(2), "b": torch.ones(2, 1)}, torch.ones(3))


INPUTS = {"image": torch.ones(2, 3, 4, 4), "age": torch.ones(2)}
TARGETS = torch.zeros(2, dtype=torch.int64)


def errors(key: str | None, inputs: Any = INPUTS, padded: Any = ()) -> list[str]:
    transform = MaskTokens() if padded else Standardise()
    return Compose({"t": transform}, keys={"t": key} if key else {}).errors(inputs, TARGETS, padded)


def test_a_transform_changes_what_it_names() -> None:
    source, ids, cpu = TensorSource(INPUTS, TARGETS), torch.arange(2), torch.device("cpu")
    compose = Compose({"t": Standardise()}, keys={"t": "image"}).fit(source, ids, lambda tensor: tensor, cpu)
    trained = compose.for_training(source, ids, ids, 0, 0, cpu)
    for inputs, _ in (trained, compose.for_evaluation(source.fetch(ids), cpu)):
        assert not inputs["image"].any() and inputs["age"].all()


def test_a_transform_without_the_right_name_is_refused() -> None:
    assert not errors("image")
    assert "set transforms.t.key to one of them" in errors(None)[0] and "image, age" in errors(None)[0]
    assert "transforms.t.key=sound: there are no such inputs" in errors("sound")[0]
    assert "leave the key out" in errors("image", torch.ones(2, 3))[0]
    assert "different lengths" in errors("age", padded=["age"])[0]


def test_a_tree_is_part_of_the_fingerprint_with_its_names() -> None:
    def content(inputs: Any) -> list[list[Any]]:
        return [column.tolist() for column in TensorSource(inputs, torch.arange(2)).fingerprint_data()]

    assert content(torch.ones(2)) == [[1, 1], [0, 1]]
    assert content({"a": torch.ones(2)}) != content({"b": torch.ones(2)})


def test_the_classes_of_a_tree_of_targets_are_its_tasks_business() -> None:
    targets = {"label": torch.tensor([9, 0]), "box": torch.ones(2, 4)}
    splits = DataSplits(*(TensorSource(torch.ones(2, 1), targets) for _ in range(2)), classes=3)
    assert splits.train.labels is None and Classification().class_weights is None
