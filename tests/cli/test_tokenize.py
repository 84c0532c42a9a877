"""`python -m trainer tokenize`: the tokens of a corpus are those of its documents, and data=tokens reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tokenizers import END, SENTENCES, byte_level, save_tokenizer
from trainer.commands import main as cli
from trainer.commands.tokenize import corpus
from trainer.data import tokens
from trainer.data.tokenization import documents, tokenizer

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes((SENTENCES[1] * 30).encode())
    lines = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate([*SENTENCES, ""]))
    Path("b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(["tokenize", *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    assert not Path("out.bin").exists() and not list(Path().glob(".*.partial"))
    return capsys.readouterr().err


def test_the_tokens_are_those_of_the_documents_and_are_trained_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces and batches are small here, so that a document has several of both."""
    monkeypatch.setattr(documents, "PIECE", 200)
    monkeypatch.setattr(corpus, "BATCH", 300)
    save_tokenizer(Path("saved"))
    assert run("a.txt", "b.jsonl.gz", "tokenizer=saved", "out=train.bin") == 0
    texts = [SENTENCES[1] * 30, *SENTENCES]
    reference = byte_level()
    expected = [token for text in texts for token in [*reference.encode(text).ids, reference.token_to_id(END)]]
    assert np.fromfile("train.bin", "<u2").tolist() == expected
    assert json.loads(Path("train.bin.json").read_text()) == {
        "dtype": "uint16",
        "tokens": len(expected),
        "vocabulary": reference.get_vocab_size(),
        "documents": 4,
        "bytes": sum(len(text.encode()) for text in texts),
        "end": reference.token_to_id(END),
        "tokenizer": tokenizer.load_tokenizer("saved").fingerprint,
    }
    out = capsys.readouterr().out
    assert f"data=tokens data.path=train.bin data.vocabulary={reference.get_vocab_size()} data.tokenizer=saved" in out
    splits = tokens("train.bin", reference.get_vocab_size(), 16, tokenizer="saved")
    assert splits.train.fetch(torch.tensor([0]))[0].tolist() == [expected[:16]]
    assert splits.text_format and splits.text_format.decode(expected[:40]) == reference.decode(expected[:40])


def test_the_end_of_documents_is_chosen_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    byte_level().save("tokenizer.json")
    assert "end=auto" in refusal(capsys, "a.txt", "tokenizer=tokenizer.json", "out=out.bin")
    assert "end=</s>" in refusal(capsys, "a.txt", "tokenizer=tokenizer.json", "out=out.bin", "end=</s>")
    for end, last in ((END, byte_level().token_to_id(END)), ("null", byte_level().encode(SENTENCES[1]).ids[-1])):
        assert run("a.txt", "tokenizer=tokenizer.json", f"out={end[:2]}.bin", f"end={end}") == 0
        assert np.fromfile(f"{end[:2]}.bin", "<u2")[-1] == last


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["there are no files to tokenize", "tokenizer has no value", "out has no value"]),
        (("c.txt", "vocab=3", "tokenizer=none", "out=none/x.bin"), ["vocab is no key", "tokenizer=none: there is no"]),
        (("c.txt", "tokenizer=saved", "out=a.txt"), ["c.txt: there is no such file", "out=a.txt exists already"]),
        (("b.jsonl.gz", "field=body", "tokenizer=saved", "out=out.bin"), ["b.jsonl.gz, line 1: it has no field body"]),
        (("latin.txt", "tokenizer=saved", "out=out.bin"), ["latin.txt is not UTF-8", "iconv"]),
        (("cut.jsonl.gz", "tokenizer=saved", "out=out.bin"), ["cut.jsonl.gz cannot be read"]),
        (("bad.jsonl", "tokenizer=saved", "out=out.bin"), ["bad.jsonl, line 2 is not JSON"]),
        (("empty.txt", "tokenizer=saved", "out=out.bin"), ["the files have no text"]),
    ],
)
def test_bad_input_leaves_no_file(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], messages: list[str]
) -> None:
    save_tokenizer(Path("saved"))
    Path("latin.txt").write_bytes("naïve".encode("latin1"))
    Path("cut.jsonl.gz").write_bytes(Path("b.jsonl.gz").read_bytes()[:-20])
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("empty.txt").touch()
    error = refusal(capsys, *arguments)
    assert all(message in error for message in messages), error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "tokenizer=PATH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (lambda: Path("t.bin").write_bytes(b"\0\0" * 60), {}, "120 bytes are not the 64 uint16 tokens that t.bin.json"),
        (lambda: None, {"dtype": "uint32"}, "data.dtype=uint32, and t.bin.json says uint16: leave data.dtype out"),
        (lambda: None, {"vocabulary": 9}, "data.vocabulary=9, and t.bin.json says 320"),
        (lambda: None, {"tokenizer": "saved"}, "is not the tokenizer that t.bin.json says"),
        (lambda: Path("t.bin.json").write_text("{}"), {}, "t.bin.json does not describe a file of tokens: KeyError"),
    ],
)
def test_a_file_that_is_not_as_described_is_refused(change, keys: dict[str, object], message: str) -> None:
    np.zeros(64, "<u2").tofile("t.bin")
    info = {"dtype": "uint16", "tokens": 64, "vocabulary": 320, "documents": 1, "bytes": 9, "end": None}
    Path("t.bin.json").write_text(json.dumps({**info, "tokenizer": "of another one"}))
    if "tokenizer" in keys:
        save_tokenizer(Path("saved"))
    change()
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        tokens("t.bin", **{"vocabulary": 320, "length": 8, **keys})  # pyright: ignore[reportArgumentType]
