"""Inputs made of a column of texts, by a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.data.sources.base import DataSplits, Source
from trainer.data.sources.texts import TextSource
from trainer.data.tokenization.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextInputs:
    """Texts as tokens, padded with a token of their tokenizer."""

    texts: Sequence[Sequence[int]]
    tokenizer: Tokenizer
    pad: int

    @staticmethod
    def of(texts: Sequence[str], tokenizer: str | None, length: int) -> TextInputs:
        """Encode texts, with the special tokens that the tokenizer puts around them.

        Args:
            texts: of all rows.
            tokenizer: see `load_tokenizer`.
            length: most tokens of a text; longer ones are cut.

        Raises:
            ValueError: there is no tokenizer, it cannot be loaded, or it has no token that pads.
        """
        if tokenizer is None:
            raise ValueError("data.columns.text needs a tokenizer\n  set data.tokenizer=FOLDER")
        loaded = load_tokenizer(tokenizer)
        pad = loaded.backend.pad_token_id
        if pad is None:
            raise ValueError(
                f"data.tokenizer={tokenizer} has no token that pads texts to the same length.\n"
                "  set one in Python: tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained(FOLDER)"
            )
        return TextInputs(loaded.encode_examples(texts, length), loaded, pad)

    def source(self, rows: np.ndarray, targets: Tensor, client_ids: np.ndarray | None) -> Source:
        texts = [self.texts[row] for row in rows.tolist()]
        return TextSource(texts, targets, self.pad, self.tokenizer.vocabulary, client_ids)

    def finish(self, splits: DataSplits) -> DataSplits:
        return splits
