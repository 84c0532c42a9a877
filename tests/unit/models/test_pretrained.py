"""Initial weights from files of both formats, all mismatches in one error, and frozen parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainer.models import GPT, MLP, DigitsCNN
from trainer.models.pretrained import freeze, load_pretrained, load_saved


def save(module: nn.Module, path: Path) -> None:
    """Save a state_dict in the format of the suffix; safetensors does not allow tensors that share memory."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)
    else:
        torch.save(module.state_dict(), path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_parameters_and_buffers_are_loaded(name: str, tmp_path: Path):
    saved, other = DigitsCNN(norm="batch"), DigitsCNN(norm="batch")
    saved(torch.randn(5, 1, 8, 8))
    save(saved, tmp_path / name)
    load_pretrained(other, tmp_path / name)
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), other.state_dict().values(), strict=True))


def test_of_tied_parameters_one_name_is_enough(tmp_path: Path):
    saved, other = GPT(width=32, layers=1), GPT(width=32, layers=1)
    tensors = {name: tensor.clone() for name, tensor in saved.state_dict().items() if name != "output.weight"}
    save_file(tensors, tmp_path / "weights.safetensors")
    load_pretrained(other, tmp_path / "weights.safetensors")
    assert torch.equal(other.output.weight, saved.tokens.weight)


def save_in_parts(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Save each tensor in a file of its own, with an index."""
    files = {name: f"model-{number:05d}-of-{len(tensors):05d}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_folder_of_hugging_face_is_loaded(parts: int, tmp_path: Path):
    saved, other = MLP(hidden=8), MLP(hidden=8)
    tensors = dict(saved.state_dict())
    save_file(tensors, tmp_path / "model.safetensors") if parts == 1 else save_in_parts(tensors, tmp_path)
    load_pretrained(other, tmp_path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "model.safetensors is not a file"),
        ({"weight_map": {"layers.1.weight": "../other.safetensors"}}, "valid: files of the same folder"),
        (
            {"weight_map": {"layers.1.weight": "gone.safetensors"}},
            "which the folder does not have",
        ),
        ({}, "index.json is damaged"),
        ([], "index.json is damaged"),
    ],
)
def test_folders_with_other_content_are_refused(index: object, message: str, tmp_path: Path):
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_pretrained(MLP(), tmp_path)


def test_all_mismatches_are_in_one_error(tmp_path: Path):
    """And nothing is loaded."""
    tensors = dict(MLP(hidden=8).state_dict())
    tensors["layers.5.weight"] = torch.zeros(7, 8)
    tensors["head.weight"] = tensors.pop("layers.3.weight")
    save_file(tensors, tmp_path / "weights.safetensors")
    module = MLP(hidden=8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit model=MLP") as refusal:
        load_pretrained(module, tmp_path / "weights.safetensors")
    message = str(refusal.value)
    assert f"model.init={tmp_path}/weights.safetensors does not fit model=MLP" in message
    assert "missing: layers.3.weight\n" in message and "unexpected: head.weight\n" in message
    assert "of another shape: layers.5.weight [7, 8] instead of [10, 8]\n" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Anything:
    """An object that only pickle can load."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights at all", "cannot be read"),
        ({"model": {}, "epoch": 3}, "holds a dict with model, epoch, not only tensors"),
        ([torch.zeros(1)], "holds a list"),
        (Anything(), "holds more than tensors"),
        (None, "is not a file"),
    ],
    ids=["noise", "training state", "list", "pickle", "nothing"],
)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_with_other_content_are_refused(content, message: str, name: str, tmp_path: Path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
        message = "cannot be read" if name.endswith("safetensors") else message
    with pytest.raises(ValueError, match=message):
        load_pretrained(MLP(), path)


def test_a_pattern_freezes_the_parameters_that_match():
    module = DigitsCNN()
    freeze(module, r"^conv|head\.2")
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "head.2.weight", "head.2.bias"]


@pytest.mark.parametrize(("pattern", "message"), [("embed", "matches no parameter"), (".", "nothing is left to train")])
def test_a_pattern_that_matches_none_or_all_is_refused(pattern: str, message: str):
    with pytest.raises(ValueError, match=message) as refusal:
        freeze(DigitsCNN(), pattern)
    assert "conv1.weight" in str(refusal.value)


@pytest.mark.parametrize("read", [load_pretrained, load_saved])
def test_rows_of_attention_in_the_order_of_an_earlier_version_are_refused(
    read: Callable[[nn.Module, Path], None], tmp_path: Path
):
    """The remedy in the message gives the model that it was."""
    saved = GPT(width=8, heads=2, layers=1)
    earlier = {}
    for name, tensor in saved.state_dict().items():
        rows = tensor.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2) if "attention_heads" in name else tensor
        earlier[name.replace("attention_heads", "attention")] = rows.clone()
    save_file(earlier, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"had the rows of blocks.0.attention.bias in another order") as refusal:
        read(GPT(width=8, heads=2, layers=1), tmp_path / "weights.safetensors")
    remedy = str(refusal.value).rsplit(": ", 1)[1]
    rows = earlier["blocks.0.attention.weight"]
    assert torch.equal(eval(remedy, {"rows": rows, "heads": 2}), saved.get_parameter("blocks.0.attention_heads.weight"))
