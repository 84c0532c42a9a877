"""Attention against its formula, and parameters that are those of earlier versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.models import GPT, ViT
from trainer.models.layers import TransformerBlock

WIDTH, HEADS, LENGTH = 12, 3, 5


def attention_by_hand(block: TransformerBlock, normed: Tensor) -> Tensor:
    """Return the output of each head, one after the other: its rows are its queries, its keys, and its values."""
    outputs = []
    size = WIDTH // HEADS
    for rows, biases in zip(
        block.attention_heads.weight.split(3 * size), block.attention_heads.bias.split(3 * size), strict=True
    ):
        query, key, value = (
            normed @ part.T + bias for part, bias in zip(rows.split(size), biases.split(size), strict=True)
        )
        scores = query @ key.T / math.sqrt(size)
        future = torch.ones(LENGTH, LENGTH).triu(1).bool()
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
    return torch.cat(outputs, -1)


def test_equal_stretches_of_rows_are_heads():
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, HEADS, dropout=0.0, is_causal=True).double()
    nn.init.normal_(block.attention_heads.bias)
    normed = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(block._attend(normed[None], None)[0], attention_by_hand(block, normed))


def test_a_seed_gives_the_parameters_that_it_gave_when_the_rows_were_ordered_otherwise():
    """The figures are those of the version before."""
    torch.manual_seed(0)
    logits = GPT(vocabulary=11, length=8, layers=2, heads=4, width=16)(torch.arange(8)[None])[0, -1, :4]
    assert logits.tolist() == pytest.approx([-0.0434871651, 0.141378656, 0.0521504059, 0.1666782796], abs=1e-6)
    torch.manual_seed(0)
    logits = ViT(classes=4, size=8, patch=4, width=16, layers=2, heads=4)(torch.arange(192.0).view(1, 3, 8, 8) / 192)[0]
    assert logits.tolist() == pytest.approx([-0.0969253927, 0.1549498141, 0.0096609164, -0.052571781], abs=1e-6)
