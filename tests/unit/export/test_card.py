"""The model card: what parsers of others read in it, and that names never become markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult
from markdown_it import MarkdownIt

from trainer.export.card import CONFUSION, LEARNING_CURVE, CardFacts, model_card
from trainer.service.version import CARD, ModelDescription, TensorSpec

UGLY = "a | b`c`\n# <script>alert(1)</script> ![x](http://x) $y$ _z_ \x1b[31m: {'k': 1}"

DESCRIPTION = ModelDescription(
    inputs=[TensorSpec("inputs", "FP32", [-1, 1, 8, 8])],
    outputs=[TensorSpec("outputs", "FP32", [-1, 3]), TensorSpec("label", "INT64", [-1])],
    task="classification",
    headline="test/accuracy",
    metrics={
        "round": 2,
        "test/accuracy": 0.9375,
        "test/loss": float("nan"),
        "validation/accuracy": 0.875,
        "client/0/test_accuracy": 0.125,
    },
    sha256={},
    label_names=["no", "yes", "perhaps"],
)
FACTS = CardFacts(
    name="shapes",
    version=3,
    architecture="DigitsCNN",
    parameters=43_050,
    data="digits",
    examples={"training": 1_294, "test": 359},
    algorithm="fedavg",
    silos=2,
    clients=10,
    seed=7,
    round=2,
    rounds=[
        {"round": 1, "test/accuracy": 0.5, "client/0/test_accuracy": 0.25},
        {"round": 2, "step": 9, "train/loss": 0.1},
        {"round": 2, "test/accuracy": 0.9375, "validation/accuracy": None},
    ],
    confusion=torch.tensor([[118, 2, 0], [1, 119, 1], [0, 3, 115]]),
)
QUANTISATION = {
    "type": "int8",
    "method": "static",
    "calibration_examples": 512,
    "metric": "validation/accuracy",
    "batch_size": 64,
    "before": {"bytes": 172_000, "figure": 0.875, "cpu_seconds": 0.004},
    "after": {"bytes": 57_000, "figure": 0.8725, "cpu_seconds": 0.0027},
}


@pytest.fixture(scope="module")
def card() -> dict[str, str]:
    return model_card(DESCRIPTION, FACTS)


def rendered(card: dict[str, str]) -> str:
    """The page of a card, by a parser of CommonMark with GitHub's tables."""
    return MarkdownIt("commonmark").enable("table").render(card[CARD].split("---\n", 2)[2])


def test_hugging_face_reads_the_front_matter(card: dict[str, str]):
    data = ModelCard(card[CARD]).data
    assert data.license == "unknown"
    assert data.tags == ["silotrain", "federated-learning"]
    assert data.model_name == "shapes"
    expected = [("test", "accuracy", 0.9375), ("validation", "accuracy", 0.875)]
    assert [(each.dataset_split, each.metric_type, each.metric_value) for each in data.eval_results] == expected
    assert all(isinstance(each, EvalResult) and each.dataset_name == "digits" for each in data.eval_results)


def test_the_page_shows_figures_with_round_and_seed_and_pictures_beside_it(card: dict[str, str]):
    page = rendered(card)
    assert "After round 2, one run with seed 7." in page
    assert "<td>test/accuracy</td>\n<td>0.9375</td>" in page
    assert re.findall('<img src="(.*?)"', page) == [LEARNING_CURVE, CONFUSION]
    assert card.keys() == {CARD, LEARNING_CURVE, CONFUSION}


def test_nothing_of_single_clients_is_in_a_card(card: dict[str, str]):
    assert not any("client/" in text or "0.125" in text or "0.25" in text for text in card.values())


def test_the_pictures_are_svg_of_the_same_bytes_each_time_and_run_nothing(card: dict[str, str]):
    ugly = replace(DESCRIPTION, label_names=[UGLY, "<b>", "&amp;"])
    pictures = model_card(ugly, FACTS)
    for name in (LEARNING_CURVE, CONFUSION):
        assert model_card(DESCRIPTION, FACTS)[name] == card[name]
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(pictures[name]).iter()}
        assert "svg" in tags and not {"script", "b", "foreignObject"} & tags


def test_the_confusion_matrix_has_its_counts_and_is_left_out_where_they_are_private(card: dict[str, str]):
    texts = [element.text for element in ElementTree.fromstring(card[CONFUSION]).iter() if element.text]
    assert {"118", "119", "115"} <= {text.strip() for text in texts}
    private = model_card(DESCRIPTION, replace(FACTS, confusion=None))
    assert private.keys() == {CARD, LEARNING_CURVE}
    assert "118" not in "".join(private.values()) and CONFUSION not in private[CARD]


def test_a_model_without_figures_has_a_card_without_them():
    assert model_card(
        replace(DESCRIPTION, headline="", metrics={}), replace(FACTS, rounds=[], confusion=None)
    ).keys() == {CARD}


def card_of_names(name: str) -> dict[str, str]:
    """A card in which everything that a user may choose has this name."""
    described = replace(
        DESCRIPTION,
        task=name,
        inputs=[TensorSpec(name, "FP32", [-1, 2])],
        label_names=[name],
        headline=f"test/{name}",
        metrics={f"test/{name}": 1.0},
    )
    facts = replace(FACTS, name=name, architecture=name, data=name, algorithm=name, license=name, confusion=None)
    return model_card(described, facts)


def test_names_of_users_are_text():
    named = card_of_names(UGLY)
    front = yaml.safe_load(named[CARD].split("---\n", 2)[1])
    assert (front["license"], front["model-index"][0]["name"]) == (UGLY, UGLY)
    tags = re.compile(r"<[^>]*>")
    assert tags.findall(rendered(named)) == tags.findall(rendered(card_of_names("x")))


def test_the_call_of_tritonclient_is_python_whatever_the_names(card: dict[str, str]):
    code = re.search("```python\n(.*?)\n```", card[CARD], re.DOTALL)
    assert code
    compile(code[1], CARD, "exec")
    assert "InferInput('inputs', [1, 1, 8, 8], 'FP32')" in code[1]
    assert "curl -d @example.json http://localhost:8080/v2/models/shapes/infer" in card[CARD]


def test_a_quantised_model_says_what_it_cost():
    page = rendered(model_card(replace(DESCRIPTION, quantisation=QUANTISATION), FACTS))
    assert "of the model before it was quantised, one run" in page
    assert "<td>bytes</td>\n<td>172 kB</td>\n<td>57 kB</td>" in page
    assert "<td>validation/accuracy</td>\n<td>0.875</td>\n<td>0.8725</td>" in page
    assert "<td>seconds</td>\n<td>4 ms</td>\n<td>2.7 ms</td>" in page
