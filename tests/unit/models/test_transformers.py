"""Models of the package transformers: from a folder, by their configuration, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.transformers import LLAMA, make_llama, save_llama
from trainer.models import from_transformers
from trainer.models.flat import FlatModel

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SEQUENCE, IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"


@pytest.mark.parametrize(
    ("architecture", "auto", "config", "inputs", "shape"),
    [
        ("gpt2", "AutoModelForCausalLM", GPT2, torch.zeros(2, 5, dtype=torch.int64), (2, 5, 50)),
        ("vit", IMAGE, {**VIT, "num_labels": 7}, torch.zeros(2, 3, 8, 8), (2, 7)),
        ("bert", SEQUENCE, {**BERT, "num_labels": 3}, torch.zeros(2, 5, dtype=torch.int64), (2, 3)),
    ],
)
def test_a_model_follows_its_configuration(architecture: str, auto: str, config: dict[str, Any], inputs, shape):
    """Every parameter has a gradient; one without would hang DistributedDataParallel."""
    module = from_transformers(architecture=architecture, auto=auto, config=config)
    logits = module(inputs).logits
    assert logits.shape == shape
    logits.square().sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_gpt2_has_as_many_parameters_as_published():
    """124,439,808 for GPT-2 small, Radford et al. 2019. The tied embedding is once in the vector."""
    with torch.device("meta"):
        module = from_transformers(architecture="gpt2")
    assert sum(parameter.numel() for parameter in module.parameters()) == 124_439_808
    small: Any = from_transformers(architecture="gpt2", config=GPT2)
    model = FlatModel(small)
    assert small.lm_head.weight is small.transformer.wte.weight
    assert len(model.shared) == sum(-(-parameter.numel() // 16) * 16 for parameter in small.parameters())


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "several files"])
def test_a_folder_is_loaded_as_transformers_does(size: str, tmp_path: Path):
    save_llama(tmp_path, size)
    assert len([*tmp_path.glob("*.safetensors")]) == (1 if size == "1GB" else 5)
    tokens = torch.randint(0, 64, (2, 9))
    mask, positions = torch.ones_like(tokens), torch.arange(9).expand(2, 9) + 3
    mask[0, :4] = 0
    ours = from_transformers(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    assert not torch.equal(ours(**inputs).logits, ours(tokens).logits)


def test_parameters_are_float32_and_a_new_head_is_new(tmp_path: Path):
    make_llama().bfloat16().save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    torch.manual_seed(4)
    module: Any = from_transformers(str(tmp_path), auto=SEQUENCE, config={"num_labels": 3})
    torch.manual_seed(4)
    again: Any = from_transformers(str(tmp_path), auto=SEQUENCE, config={"num_labels": 3})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.score.weight.shape == (3, 32) and torch.equal(module.score.weight, again.score.weight)
    trunk = make_llama().state_dict()["model.norm.weight"]
    assert torch.equal(module.model.norm.weight, trunk)


def damage(folder: Path, change: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    if change == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "no config":
        (folder / "config.json").unlink()
    elif change == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif change == "kernel":
        (folder / "config.json").write_text(json.dumps({**settings, "attn_implementation": "some/kernel"}))
    elif change == "code":
        own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}
        (folder / "config.json").write_text(json.dumps({**settings, **own}))
    elif change == "another model":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", **BERT}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no weights", "has no safetensors: .* can execute code"),
        ("no config", "has no config.json"),
        ("adapter", "is an adapter"),
        ("kernel", "names code to download: attn_implementation=some/kernel"),
        ("code", "needs code of its own, which is not executed"),
        ("another model", "has no tensor of a BertLMHeadModel"),
    ],
)
def test_folders_of_other_kinds_are_refused(change: str, message: str, tmp_path: Path):
    damage(save_llama(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        from_transformers(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither model.path nor model.architecture"),
        ({"path": "a", "architecture": "llama"}, "both model.path and model.architecture"),
        ({"path": "nowhere"}, "model.path=nowhere is no folder"),
        ({"architecture": "lama"}, "model.architecture=lama is unknown to transformers .*\n  valid: llama"),
        ({"architecture": "llama", "auto": "AutoModelForCausalLLM"}, "is no class .*\n  valid: AutoModelForCausalLM"),
        ({"architecture": "llama", "auto": IMAGE}, f"{IMAGE} has no head for llama\n  valid: .*AutoModelForCausalLM"),
        (
            {"architecture": "llama", "config": {"num_hidden_layer": 2}},
            "model.config.num_hidden_layer is no field of LlamaConfig; did you mean model.config.num_hidden_layers?",
        ),
        ({"architecture": "llama", "config": {"num_hidden_layers": "two"}}, "'num_hidden_layers' expected int"),
        ({"architecture": "llama", "config": LLAMA | {"num_attention_heads": 5}}, "not a multiple of the number"),
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        from_transformers(**arguments)


def test_another_shape_is_named(tmp_path: Path):
    save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head.weight \[64, 32\] instead of \[65, 32\]"):
        from_transformers(str(tmp_path), config={"vocab_size": 65})


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install silotrain\[transformers\]"):
        from_transformers(architecture="gpt2")
