"""Samples of prompts: drawn from the model's logits, the same for a seed, on one rank, wherever a user looks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import make_data, make_run
from trainer.data import DataSplits
from trainer.data.sources.text_format import TextFormat, byte_format
from trainer.distributed.topology import distributed
from trainer.loggers import ConsoleLogger, JsonLinesLogger, Metrics, TensorBoardLogger, TextSample, read_jsonl
from trainer.loop.fit import fit
from trainer.loop.options import SampleOptions
from trainer.loop.text_samples import continue_text
from trainer.models import GPT, LSTM
from trainer.utils.seeding import generator

LENGTH, VOCABULARY = 16, 64
LETTERS = TextFormat(
    encode=lambda text: [(ord(letter) - 32) % 63 for letter in text],
    decode=lambda tokens: "".join(chr(token + 32) for token in tokens),
    length=LENGTH,
    end=frozenset({63}),
)


class Heard:
    """A logger that keeps the samples."""

    def __init__(self) -> None:
        self.samples: dict[int, list[TextSample]] = {}

    def log_round(self, metrics: Metrics) -> None: ...

    def log_samples(self, round: int, samples: list[TextSample]) -> None:
        self.samples[round] = samples

    def finalize(self, result: dict[str, Any], artifacts: Any) -> None:
        self.last = artifacts.sample

    def close(self) -> None: ...


def lettered(**options: Any) -> dict[str, Any]:
    splits = make_data("gpt", 16)
    data = DataSplits(splits.train, splits.test, VOCABULARY, text_format=LETTERS)
    return {"data": data, "sample": SampleOptions(**options)}


def train(options: dict[str, Any]) -> tuple[dict[int, list[TextSample]], dict[str, Any]]:
    heard = Heard()
    with distributed() as topology:
        run = make_run(topology, [16], "gpt", rounds=2, **lettered(**options))
        weights = fit(run, [heard] if topology.rank == 0 else []).model.state_dict()
    assert topology.rank or bool(heard.last) != bool(options)  # without prompts there is a sample at the end
    return heard.samples, weights


def by_hand(module: nn.Module, prompt: str, count: int, temperature: float, number: int) -> str:
    numbers, tokens = generator(0, "sample", number), LETTERS.encode(prompt)
    for _ in range(count):
        logits = module(torch.tensor([tokens[-LENGTH:]]))[0, -1]
        drawn = torch.multinomial((logits / temperature).softmax(0), 1, generator=numbers) if temperature else None
        token = int(logits.argmax() if drawn is None else drawn)
        if token == 63:
            break
        tokens.append(token)
    return LETTERS.decode(tokens[len(prompt) :])


@torch.no_grad()
def test_they_are_drawn_from_the_logits_on_one_rank_and_change_nothing(ranks) -> None:
    prompts = ["ABC", "A LONG PROMPT, LONGER THAN A WINDOW"]
    options = {"prompts": prompts, "tokens": 20, "temperature": 0.7}
    (samples, weights), (none, _) = ranks(2).run(train, options)
    assert none == {} and [*samples] == [1, 2]
    assert [sample.prompt for sample in samples[2]] == prompts
    module = GPT(vocabulary=VOCABULARY, length=LENGTH, layers=2, heads=2, width=32).eval()
    module.load_state_dict(weights)
    assert [each.text for each in samples[2]] == [by_hand(module, p, 20, 0.7, n) for n, p in enumerate(prompts)]
    (_, silent), _ = ranks(2).run(train, {})
    assert all(torch.equal(weights[name], silent[name]) for name in weights)


@pytest.mark.parametrize("make", [lambda: GPT(VOCABULARY, LENGTH, 1, 2, 16), lambda: LSTM(VOCABULARY, width=16)])
@torch.no_grad()
def test_without_temperature_they_are_the_most_likely_tokens(make) -> None:
    with distributed() as topology:
        run = make_run(topology, [16], "gpt", **lettered())
        module = make().eval()
        assert continue_text(run, module, "AB", 12, 0.0) == by_hand(module, "AB", 12, 0.0, 0)


def test_they_end_with_a_text() -> None:
    class Ends(nn.Module):
        def forward(self, tokens):
            return nn.functional.one_hot((tokens + 1).clamp(max=63), 80).float()  # more outputs than there are tokens

    with distributed() as topology:
        run = make_run(topology, [16], "gpt", **lettered())
        assert continue_text(run, Ends(), "Z", 50, 0.0) == "[\\]^"


def test_bytes_and_their_text() -> None:
    known = byte_format(8)
    assert known.decode(known.encode("naïve 日本")) == "naïve 日本"
    assert known.decode([255, 65]) == "\ufffdA"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"data": make_data("gpt", 16)}, r"sample.prompts=\[A\]: the run predicts no tokens whose text is known"),
        ({"sample": SampleOptions(prompts=("A", ""))}, "a prompt without tokens"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(choices: dict[str, Any], message: str) -> None:
    with distributed() as topology, pytest.raises(ValueError, match=message):
        make_run(topology, [16], "gpt", **{**lettered(prompts=("A",)), **choices})


def test_where_a_user_finds_them(tmp_path: Path) -> None:
    """A resumed run writes the rounds after its checkpoint anew; an escape sequence does not reach the terminal."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = [TextSample("To be", " or\n    not \x1b[2J日本")]
    console, lines = io.StringIO(), JsonLinesLogger(tmp_path / "metrics.jsonl")
    board = TensorBoardLogger(tmp_path / "tensorboard", {})
    for round in (1, 2):
        for logger in (lines, board, ConsoleLogger(2, stream=console, is_terminal=False)):
            logger.log_round({"round": round})
            logger.log_samples(round, samples)
        lines.close()
        lines = JsonLinesLogger(tmp_path / "metrics.jsonl", keep_rounds=0)
    board.close()
    lines.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"round": 2, "prompt": "To be", "text": samples[0].text}]
    assert "  To be |  or\\n    not \\x1b[2J日本\n" in console.getvalue()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [each.tensor_proto.string_val[0].decode() for each in events.Tensors("sample/1/text_summary")]
    assert written == ["    To be or\n        not \x1b[2J日本"] * 2
