"""Adapters by peft: where they go, what trains, what is exported and merged, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.transformers import make_llama, save_llama
from trainer.export.library_layout import write_library_layout
from trainer.models import GPT, MLP, ViT, from_transformers, lora
from trainer.models.adapters import adapter_parameters, attach_adapter, merge_adapter
from trainer.models.flat import FlatModel

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gpt": (lambda: GPT(vocabulary=16, length=8, layers=2, heads=2, width=16), torch.arange(8).view(1, 8)),
    "vit": (lambda: ViT(size=8, width=16, layers=2, heads=2), torch.arange(192.0).view(1, 3, 8, 8) / 100),
    "mlp": (lambda: MLP(inputs=6, hidden=8, classes=3), torch.arange(6.0).view(1, 6)),
}


def randomize(module: nn.Module) -> nn.Module:
    """Give the trainable parameters random values: an adapter is without effect at first."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=numbers)
    return module.eval()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_ours_take_adapters(name: str, dora: bool, tmp_path: Path):
    """At first the outputs are those of the model. Peft reads the adapter, and merged is equal to unmerged."""
    make, inputs = MODELS[name]
    module, base = seeded(make), seeded(make)
    attach_adapter(module, lora(rank=2, dora=dora))
    torch.testing.assert_close(module(inputs), base(inputs))
    randomize(module)
    outputs = module(inputs)
    assert not torch.allclose(outputs, base(inputs), atol=1e-3)
    write_library_layout(module, tmp_path, merge=True)
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(inputs), outputs)
    from safetensors.torch import load_file

    merged = seeded(make)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(inputs), outputs, rtol=0, atol=1e-5 * float(outputs.detach().abs().max()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora(rank=2, alpha=2, modules_to_save=["lm_head"]),
        lambda: peft.LoHaConfig(r=2),
        lambda: peft.IA3Config(feedforward_modules=[]),
    ],
    ids=["lora and a head", "loha", "ia3"],
)
def test_an_exported_adapter_gives_equal_logits(make: Callable[[], Any], tmp_path: Path):
    """By PeftModel on the base, and merged by AutoModel; nothing but these folders is left."""
    tokens = torch.arange(10).view(2, 5)
    module = from_transformers(str(save_llama(tmp_path / "base")))
    attach_adapter(module, make())
    logits = randomize(module)(tokens).logits
    write_library_layout(module, tmp_path, merge=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "huggingface"}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(adapted(tokens).logits, logits)
    by_name = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()  # which finds the base by its path
    assert torch.equal(by_name(tokens).logits, logits)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface").eval()
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=1e-5)
    assert merge_adapter(module).state_dict().keys() == make_llama().state_dict().keys()


def test_a_peft_model_of_the_users_own_saves_itself(tmp_path: Path):
    tokens, config = torch.arange(10).view(2, 5), peft.LoraConfig(r=2, target_modules=["q_proj"])
    module = peft.get_peft_model(make_llama(), config)
    logits = randomize(module)(tokens).logits
    write_library_layout(module, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "huggingface").eval()
    assert torch.equal(loaded(tokens).logits, logits) and len([*tmp_path.iterdir()]) == 1


def test_a_base_in_bfloat16_keeps_the_adapter_in_float32():
    module = make_llama()
    attach_adapter(module, lora(rank=2, modules_to_save=["lm_head"]), "q_proj", base_dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.zeros(1, 3, dtype=torch.int64)).logits.float().sum().backward()
    assert len(FlatModel(module).shared_state()) == 2 * 2 + 1


def test_targets_are_found_anywhere_in_the_names():
    module = make_llama()
    attach_adapter(module, lora(rank=2), r"layers\.1.*(q|v)_proj")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    prefix = "model.layers.1.self_attn"
    assert trained == {f"{prefix}.{layer}.lora_{m}.default.weight" for layer in ("q_proj", "v_proj") for m in "AB"}
    assert trained == adapter_parameters(module)


def test_without_targets_all_linear_layers_but_heads_are_adapted():
    module = make_llama()
    attach_adapter(module, lora(rank=2))
    assert len(adapter_parameters(module)) == 2 * 2 * 7 and not any("lm_head" in n for n in adapter_parameters(module))


def test_a_alone_may_stay_as_it_is():
    module = make_llama()
    attach_adapter(module, lora(rank=2), "q_proj", train="B")
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained == [f"model.layers.{layer}.self_attn.q_proj.lora_B.default.weight" for layer in (0, 1)]
    assert len(adapter_parameters(module)) == 4


@pytest.mark.parametrize(
    ("attach", "message"),
    [
        (
            lambda: attach_adapter(GPT(), lora(), "q_proj"),
            "adapter.targets=q_proj matches no layer of model=GPT\n  its layers: tokens, positions, attention_heads, ",
        ),
        (lambda: attach_adapter(nn.Linear(2, 2), lora()), "adapter.targets has no value, and there is no layer"),
        (lambda: attach_adapter(GPT(), lora(rank=0)), "adapter.rank=0\n  valid: 1 or more"),
        (lambda: attach_adapter(GPT(), lora(dropout=1.0)), "adapter.dropout=1.0\n  valid: 0 to below 1"),
        (lambda: attach_adapter(GPT(), peft.LoHaConfig(r=4), train="B"), "a LoHaConfig has no matrices A and B"),
        (lambda: attach_adapter(GPT(), peft.PromptTuningConfig(num_virtual_tokens=4)), "adapter=PromptTuningConfig: "),
        (lambda: attach_adapter(GPT(), nn.Linear(2, 2)), "adapter= gave a Linear"),
    ],
)
def test_what_cannot_be_adapted_is_refused(attach: Callable[[], None], message: str):
    with pytest.raises(ValueError, match=message):
        attach()


def test_a_finished_model_is_what_transformers_loads(tmp_path: Path):
    """With the files of the tokenizer; a folder of an earlier start is replaced."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tokenizer / name).write_text("{}")
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/old").touch()
    module, tokens = make_llama().eval(), torch.arange(10).view(2, 5)
    FlatModel(module)
    write_library_layout(module, tmp_path, tokenizer=tokenizer)
    assert {path.name for path in (tmp_path / "huggingface").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface").eval()
    assert torch.equal(loaded(tokens).logits, module(tokens).logits)


def test_tied_weights_stay_tied_in_the_export(tmp_path: Path):
    config = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    module, tokens = from_transformers(architecture="gpt2", config=config).eval(), torch.arange(10).view(2, 5)
    FlatModel(module)
    write_library_layout(module, tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface").eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(tokens).logits, module(tokens).logits)


def test_a_model_of_neither_leaves_nothing(tmp_path: Path):
    write_library_layout(GPT(), tmp_path)
    assert not any(tmp_path.iterdir())
