"""Columns of texts: the batches are those of transformers, and padding changes no output."""

from __future__ import annotations

import csv as csv_module
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tokenizers import SENTENCES, save_tokenizer, word_pieces
from trainer.config.compatibility import check_model_fits_data
from trainer.data import DataSplits, csv, jsonl, parquet
from trainer.models.calling import call_model
from trainer.models.outputs import SelectOutput
from trainer.tasks import Classification

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

TEXTS = [SENTENCES[number % 3].strip() * (number % 4 + 1) + "\n" * (number % 2) for number in range(20)]
LABELS = ["good" if number % 3 else "bad" for number in range(20)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer like that of BERT, with the tokens that it puts around a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    tokenizer = word_pieces()
    ends = [("[UNK]", 0), ("[PAD]", 1)]
    tokenizer.post_processor = TemplateProcessing(single="[UNK] $A [PAD]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained("saved")
    return tmp_path / "saved"


def write(kind: str, texts: list[Any]) -> str:
    import pyarrow

    rows = [{"review": text, "label": label} for text, label in zip(texts, LABELS, strict=True)]
    with open(f"a.{kind}", "w", newline="") as file:
        if kind == "csv":
            writer = csv_module.DictWriter(file, ["review", "label"])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    return f"a.{kind}"


READERS: dict[str, Callable[..., DataSplits]] = {"csv": csv, "jsonl": jsonl, "parquet": parquet}


@pytest.mark.parametrize("kind", READERS)
def test_batches_are_those_of_transformers(folder: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    path = write(kind, TEXTS)
    splits = READERS[kind](path, columns={"text": "review"}, tokenizer=str(folder), text_length=12, test_path=path)
    assert splits.label_names == ("bad", "good")
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), [7, 0, 2]
    inputs, targets = splits.train.fetch(torch.tensor(ids))
    expected = tokenizer([TEXTS[row] for row in ids], padding=True, truncation=True, max_length=12, return_tensors="pt")
    assert {*inputs} == {"input_ids", "attention_mask"}
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert targets.tolist() == [LABELS[row] == "good" for row in ids]
    assert splits.train.labels is not None and splits.train.labels.tolist() == [label == "good" for label in LABELS]


def test_padding_changes_no_output_and_a_small_vocabulary_is_named(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    splits = csv(write("csv", TEXTS), columns={"text": "review"}, tokenizer=str(folder))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for vocabulary in (120, 50):
        torch.manual_seed(0)
        module = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=vocabulary, **sizes)).eval()
        module.register_forward_hook(SelectOutput("logits"))
        config = {"config": {"vocab_size": vocabulary}}
        if vocabulary == 50:
            with pytest.raises(ValueError, match=r"set model.config.vocab_size=1\d\d"):
                check_model_fits_data(module, Classification(), splits, config)
            continue
        check_model_fits_data(module, Classification(), splits, config)
        module.eval()
        together = call_model(module, splits.train.fetch(torch.arange(8))[0])
        alone = torch.cat([call_model(module, splits.train.fetch(torch.tensor([row]))[0]) for row in range(8)])
        assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "keys", "message"),
    [
        (TEXTS, {"tokenizer": None}, "data.columns.text needs a tokenizer\n *set data.tokenizer=FOLDER"),
        (TEXTS, {"tokenizer": "plain"}, "data.tokenizer=plain has no token that pads"),
        ([*TEXTS[:-1], None], {}, "review: 1 of 20 examples are missing"),
        ([*range(20)], {}, "review: int64; a column of texts needs texts"),
        (TEXTS, {"columns": {"text": "review", "number": ["age"]}}, "data.columns.text=review with age: an image, or"),
        (TEXTS, {"columns": {"text": "body"}}, "body: there is no such column; valid: review, label"),
    ],
)
def test_texts_that_cannot_be_encoded_are_refused(
    folder: Path, texts: list[Any], keys: dict[str, Any], message: str
) -> None:
    save_tokenizer(Path("plain"), pad_token=None)
    with pytest.raises(ValueError, match=message):
        jsonl(write("jsonl", texts), **{"columns": {"text": "review"}, "tokenizer": str(folder), **keys})
