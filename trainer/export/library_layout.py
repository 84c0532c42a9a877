"""A finished model in the layout of the library that it comes from: adapter/ of peft, huggingface/ of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from trainer.checkpoint.format import write_tensors
from trainer.models.adapters import adapter_files, is_adapted, merge_adapter

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def write_library_layout(module: nn.Module, folder: Path, merge: bool = False, tokenizer: Path | None = None) -> None:
    """Write a model as the library does that it comes from; nothing, if it comes from none.

    * An adapter goes to `adapter/`, which PeftModel.from_pretrained reads.
    * A model of Hugging Face goes to `huggingface/`, which AutoModel.from_pretrained reads.
    * With `merge` the model with its adapter merged goes there, or to `merged.safetensors` if it is of another kind.

    Args:
        module: the finished model.
        folder: the run folder.
        merge: whether to write the merged model too.
        tokenizer: the file or folder of the tokenizer of the data, which is copied beside the model.
    """
    if is_adapted(module):
        _write_folder(folder / "adapter", lambda path: _write_adapter(module, path), tokenizer)
        if not merge:
            return
        module = merge_adapter(module)
        if not hasattr(module, "save_pretrained"):
            write_tensors(folder / "merged.safetensors", {n: t.cpu() for n, t in module.state_dict().items()})
    if save := getattr(module, "save_pretrained", None):
        _write_folder(folder / "huggingface", save, tokenizer)


def _write_adapter(module: nn.Module, folder: Path) -> None:
    config, tensors = adapter_files(module)
    write_tensors(folder / "adapter_model.safetensors", {name: tensor.cpu() for name, tensor in tensors.items()})
    config.save_pretrained(folder)


def _write_folder(folder: Path, write: Callable[[Path], object], tokenizer: Path | None) -> None:
    """Write a folder aside, and rename it; one of an earlier start, which ended before the result, is replaced."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    if tokenizer and tokenizer.is_dir():
        for file in {file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)}:
            shutil.copyfile(file, aside / file.name)
    elif tokenizer:
        shutil.copyfile(tokenizer, aside / "tokenizer.json")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
