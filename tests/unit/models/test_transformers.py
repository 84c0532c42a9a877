"""Models of the package transformers, if installed; if not, the error."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from trainer.models import Transformers

GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "use_cache": False}
VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("architecture", "head", "config", "inputs", "shape"),
    [
        ("gpt2", "next_token", GPT2, torch.zeros(2, 5, dtype=torch.int64), (2, 5, 50)),
        ("vit", "image_class", {**VIT, "num_labels": 7}, torch.zeros(2, 3, 8, 8), (2, 7)),
        ("bert", "sequence_class", {**BERT, "num_labels": 3}, torch.zeros(2, 5, dtype=torch.int64), (2, 3)),
    ],
)
def test_a_model_follows_its_configuration(architecture: str, head: Any, config: dict[str, Any], inputs, shape):
    """Every parameter has a gradient; one without would hang DistributedDataParallel."""
    pytest.importorskip("transformers")
    module = Transformers(architecture, head, config)
    outputs = module(inputs)
    assert outputs.shape == shape
    outputs.square().sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_gpt2_has_as_many_parameters_as_published():
    """124,439,808 for GPT-2 small, Radford et al. 2019."""
    pytest.importorskip("transformers")
    with torch.device("meta"):
        module = Transformers("gpt2", "next_token", {})
    assert sum(parameter.numel() for parameter in module.parameters()) == 124_439_808


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install transformers"):
        Transformers("gpt2", "next_token", GPT2)
