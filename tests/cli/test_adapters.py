"""A run that trains an adapter, from a folder of Hugging Face to others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.command import work
from tests.support.transformers import LLAMA
from trainer.checkpoint.run_dir import RunDir
from trainer.models import from_transformers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TRAINABLE = 2 * 4 * (32 + 32)  # two layers, the rank, and both sides of q_proj


@pytest.mark.long  # it imports peft in two ranks more
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_a_run_leaves_an_adapter_and_the_merged_model(ranks, tmp_path: Path) -> None:
    """Which give equal logits. The adapter alone is sent, and saved; a smoke run resumes it."""
    base = from_transformers(architecture="llama", config=LLAMA | {"vocab_size": 256})
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    overrides = [
        *("data=text", f"data.path={tmp_path / 'text.txt'}", "data.length=16", "optimizer.lr=0.1", "batch_size=4"),
        *("model=transformers", f"model.path={tmp_path / 'base'}", "adapter=lora", "adapter.rank=4"),
        *("adapter.targets=q_proj", "adapter.merge=true", "algorithm=fedavg", "silos=2", "run.smoke=true"),
    ]
    ranks(2).run(work, [*overrides, f"run_dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    assert run.result()["bytes_between_silos"] == 2 * 2 * TRAINABLE * 4
    assert sum(tensor.numel() for tensor in load_file(run.path / "model.safetensors").values()) == TRAINABLE
    assert json.loads((run.path / "adapter/adapter_config.json").read_text())["r"] == 4
    tokens = torch.arange(20).view(2, 10)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    before = plain(tokens).logits
    adapted = peft.PeftModel.from_pretrained(plain, run.path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(run.path / "huggingface").eval()
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(before, adapted(tokens).logits, atol=1e-4)
