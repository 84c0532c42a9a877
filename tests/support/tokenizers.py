"""Small tokenizers, trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SENTENCES = [
    "the quick brown fox jumps over the lazy dog\n",
    "it's 12,345 o'clock; don't ask why!\n\nnaïve café, 日本語 🙂\r\n",
    "\tdef f(x):\n\t\treturn x + 1  # and so on\n",
]
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Any:
    """Return a BPE of bytes, as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def metaspace(prefix: str) -> Any:
    """Return a BPE as sentencepiece has it, whose unknown characters are bytes; `prefix` is always, or never."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    trained.train_from_iterator([word for text in SENTENCES for word in text.replace(" ", " ▁").split(" ")], trainer)
    learnt = json.loads(trained.to_str())["model"]
    names = [*learnt["vocab"], "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = {name: token for token, name in enumerate(names)}, [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL)
    steps = [normalizers.Prepend("▁")] if prefix == "always" else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_pieces() -> Any:
    """Return word pieces of lower-case text, as BERT has them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def save_tokenizer(folder: Path, template: str | None = None, **special: str | None) -> Path:
    """Save the tokenizer of bytes as transformers does, with a chat template or without one; return the folder."""
    from transformers import PreTrainedTokenizerFast

    names = {name: token for name, token in {"eos_token": END, "pad_token": END, **special}.items() if token}
    saved = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **names)
    saved.chat_template = template
    saved.save_pretrained(folder)
    return folder
