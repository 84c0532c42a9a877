"""Tokenizers from files: their tokens in pieces of a text, their bytes, and refusals."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tokenizers import END, SENTENCES, byte_level, metaspace, save_tokenizer, word_pieces
from trainer.data.tokenization.tokenizer import Tokenizer, divide, load_tokenizer

pytest.importorskip("transformers")

KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "metaspace": lambda: metaspace("never"),
    "metaspace with a prefix": lambda: metaspace("always"),
    "word pieces": word_pieces,
}
WORDS = ["the", "quick", "o'clock", "12,345", "日本語", "🙂", "naïve", " ", "\n", "\n\n", "  ", "\t", ".", END]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, make in KINDS.items():
        make().save(str(folder / f"{name}.json"))
    return {name: load_tokenizer(folder / f"{name}.json") for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=80))
def test_the_tokens_of_the_pieces_are_those_of_the_text(loaded: dict[str, Tokenizer], kind: str, words: list[str]):
    text, tokenizer = "".join(words), loaded[kind]
    pieces = [text[start : start + 40] for start in range(0, len(text), 40)]
    parts = list(divide(pieces, context=40))
    assert sum(part.bytes for part in parts) == len(text.encode())
    tokens = [row for part in tokenizer.encode_parts(parts) for row in part.tolist()]
    assert tokens == tokenizer.fast.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("kind", "known"),
    [("byte level", True), ("metaspace", True), ("metaspace with a prefix", False), ("word pieces", False)],
)
def test_the_bytes_of_tokens_add_up_to_those_of_the_text_or_are_not_known(
    loaded: dict[str, Tokenizer], kind: str, known: bool
) -> None:
    sizes = loaded[kind].token_bytes
    assert (sizes is not None) == known
    for text in SENTENCES if sizes is not None else ():
        (tokens,) = loaded[kind].encode([text + END])
        assert sizes is not None and sizes[tokens].sum() == len(text.encode())


def test_a_folder_of_transformers_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tokenizer(tmp_path / "saved")
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setattr(socket, "create_connection", None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocabulary == len(tokenizer.backend)
    assert tokenizer.end == tokenizer.token_of(END, "end")
    assert tokenizer.encode(SENTENCES) == [
        tokenizer.backend(text, add_special_tokens=False)["input_ids"] for text in SENTENCES
    ]
    assert tokenizer.decode([*tokenizer.encode(SENTENCES)[1], tokenizer.end]) == SENTENCES[1]
    with pytest.raises(ValueError, match=r"end=</s>: the tokenizer .*saved has no such token"):
        tokenizer.token_of("</s>", "end")


def test_a_file_that_cuts_and_pads_its_texts_does_neither_here(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = SENTENCES[0]
    assert load_tokenizer(tmp_path / "tokenizer.json").encode([text]) == [byte_level().encode(text).ids]


def test_equal_vocabularies_have_equal_fingerprints(loaded: dict[str, Tokenizer], tmp_path: Path) -> None:
    again = load_tokenizer(save_tokenizer(tmp_path / "saved"))
    assert again.fingerprint == loaded["byte level"].fingerprint
    assert len({tokenizer.fingerprint for tokenizer in loaded.values()}) >= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data.tokenizer=.*missing: there is no such file or folder\n  valid: a tokenizer.json"),
        (b"{}", r"data.tokenizer=.* cannot be read: .*\n  valid: a tokenizer.json"),
        (b"\x80\x04.", r"data.tokenizer=.* cannot be read: .*\n  valid: a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "missing"
    if content is not None:
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"data.tokenizer=.* cannot be read"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_empty_text_has_no_parts() -> None:
    assert list(divide([])) == []
    assert np.array_equal([part.bytes for part in divide(["é"])], [2])
