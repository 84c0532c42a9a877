"""Training on conversations: the loss is transformers' own, whether they are padded, packed, or alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import make_clients, make_run
from tests.support.tokenizers import MARKED, save_tokenizer
from trainer.config.compatibility import check_model_fits_data
from trainer.data import DataSplits, chat
from trainer.distributed.topology import distributed
from trainer.loop.fit import fit
from trainer.loop.text_samples import continue_text
from trainer.models import GPT, LSTM
from trainer.models.outputs import SelectOutput
from trainer.tasks import LanguageModelling

pytest.importorskip("transformers")

CONVERSATIONS, LENGTH = 12, 120
NOTHING = {"optimizer": lambda named: torch.optim.SGD([parameter for _, parameter in named], lr=0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tokenizer(tmp_path_factory.mktemp("chat"), MARKED)
    with (folder / "a.jsonl").open("w") as file:
        for number in range(CONVERSATIONS):
            print(json.dumps({"prompt": "why? " * (number % 3), "response": "fox dog " * (number % 5 + 1)}), file=file)
    return folder


def read(folder: Path, **keys: Any) -> DataSplits:
    return chat(folder / "a.jsonl", folder, LENGTH, test_path=folder / "a.jsonl", **keys)


def llama(vocabulary: int) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocabulary, use_cache=False, **sizes))
    module.register_forward_hook(SelectOutput("logits"))
    return module


def figures(module: nn.Module, splits: DataSplits, **choices: Any) -> dict[str, float]:
    """Return the figures of a run that trains nothing."""
    assert splits.text_format
    clients = make_clients([len(splits.train)], len(splits.test))
    task, data = LanguageModelling(splits.text_format.token_bytes), {"data": splits, "clients": clients}
    with distributed() as topology:
        run = make_run(topology, [len(splits.train)], module=module, task=task, **data, **NOTHING, **choices)
        return fit(run).metrics


def test_the_loss_is_that_of_transformers_padded_or_packed(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, splits = AutoTokenizer.from_pretrained(folder), read(folder)
    module, total, count, size = llama(splits.classes or 0), 0.0, 0, 0
    for line in map(json.loads, (folder / "a.jsonl").read_text().splitlines()):
        turns = [("user", line["prompt"]), ("assistant", line["response"])]
        messages = [{"role": role, "content": content} for role, content in turns]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["assistant_masks"]])
        with torch.no_grad():
            loss = module.forward(input_ids=tokens, labels=tokens.masked_fill(mask == 0, -100)).loss
        total, count = total + loss.item() * int(mask.sum()), count + int(mask.sum())
        size += len((line["response"] + "\n").encode())
    for found in (splits, read(folder, packed=True)):
        metrics = figures(module, found, batch_size=5)
        losses = [metrics["train/loss"], metrics["test/loss"]]
        assert losses == pytest.approx([total / count] * 2, rel=1e-5)
        assert metrics["test/bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_packed_conversations_are_kept_apart_or_refused(folder: Path) -> None:
    """A gpt has the same loss of them, packed or not; a model that ignores where they begin is found out."""
    plain, packed = read(folder), read(folder, packed=True)
    vocabulary = plain.classes or 0
    losses = [figures(GPT(vocabulary, LENGTH, 1, 2, 16), part)["test/loss"] for part in (plain, packed)]
    assert all(math.isfinite(loss) for loss in losses)

    class Leaks(GPT):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids)

    torch.manual_seed(0)
    for module in (GPT(vocabulary, LENGTH, 2, 2, 16), llama(vocabulary)):
        check_model_fits_data(module, LanguageModelling(), packed, {})
    with pytest.raises(ValueError, match=r"model=Leaks lets packed texts see each other.\n  set data.packed=false"):
        check_model_fits_data(Leaks(vocabulary, LENGTH, 1, 2, 16), LanguageModelling(), packed, {})
    with pytest.raises(ValueError, match=r"model=LSTM cannot take .*position_ids(.|\n)*set data.packed=false"):
        check_model_fits_data(LSTM(vocabulary, width=16), LanguageModelling(), packed, {})


def test_a_vocabulary_larger_than_the_models_is_named(folder: Path) -> None:
    splits = read(folder)
    for key, module in (("vocabulary", GPT(300, LENGTH, 1, 2, 16)), ("config.vocab_size", llama(300))):
        given = {"vocabulary": 300} if key == "vocabulary" else {"config": {"vocab_size": 300}}
        with pytest.raises(ValueError, match=rf"model.{key}={splits.classes}"):
            check_model_fits_data(module, LanguageModelling(), splits, given)


@pytest.mark.parametrize("make", [lambda vocabulary: GPT(vocabulary, LENGTH, 1, 2, 16), llama])
def test_a_prompt_is_a_question_in_the_template(folder: Path, make: Callable[[int], nn.Module]) -> None:
    splits = read(folder)
    assert splits.text_format
    asked = splits.text_format.encode("why?")
    assert splits.text_format.decode(asked) == "user\nwhy?\nassistant\n"
    module = make(splits.classes or 0).eval()
    with distributed() as topology, torch.no_grad():
        clients = make_clients([len(splits.train)], len(splits.test))
        run = make_run(
            topology, [len(splits.train)], module=module, task=LanguageModelling(), data=splits, clients=clients
        )
        written = continue_text(run, module, "why?", 1, 0.0)
        likely = int(module(torch.tensor([asked]))[0, -1, : splits.classes].argmax())
    assert written == ("" if likely in splits.text_format.end else splits.text_format.decode([likely]))
